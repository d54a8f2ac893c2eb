//! Against hand-written bytes of the other side. Interoperability with another implementation: `tests/fleet`.

use super::*;
use tokio::net::TcpListener;

/// A peer that shook hands as `kind` and then does what `then` says.
async fn peer<F>(
    kind: &'static str,
    minor: u8,
    then: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> Endpoint
where
    F: Future<Output = ()> + Send,
{
    raw_peer(move |mut stream| async move {
        let mut theirs = greeting();
        theirs[11] = minor;
        stream.write_all(&theirs).await.unwrap();
        let mut ready = b"\x05READY".to_vec();
        property(&mut ready, "Socket-Type", kind.as_bytes());
        let mut out = Vec::new();
        push_frame(&mut out, FLAG_COMMAND, &ready);
        stream.write_all(&out).await.unwrap();
        then(stream).await;
    })
    .await
}

async fn raw_peer<F>(then: impl FnOnce(TcpStream) -> F + Send + 'static) -> Endpoint
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        then(stream).await;
    });
    Endpoint::new("127.0.0.1", port)
}

/// Keeps a connection open.
async fn hold(stream: TcpStream) {
    let _open = stream;
    std::future::pending::<()>().await;
}

fn frames(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        push_frame(&mut out, if i + 1 < parts.len() { FLAG_MORE } else { 0 }, part);
    }
    out
}

fn parts(message: &Message) -> Vec<&[u8]> {
    message.frames().collect()
}

#[tokio::test]
async fn messages_arrive_whole_however_the_bytes_come() {
    let long = vec![7; 100_000];
    let sent = long.clone();
    let to = peer("PUB", 1, move |mut stream| async move {
        let mut bytes = frames(&[b"t", b"", &sent]);
        bytes.extend(frames(&[b"second"]));
        for chunk in bytes.chunks(1777) {
            stream.write_all(chunk).await.unwrap();
            tokio::task::yield_now().await;
        }
        // Not closed, which would reset what is still on its way.
        stream.shutdown().await.unwrap();
        hold(stream).await;
    })
    .await;
    let mut connection = Connection::open(&to, Role::Sub).await.unwrap();
    connection.subscribe("").await.unwrap();
    let message = connection.recv().await.unwrap();
    assert_eq!(parts(&message), [&b"t"[..], b"", &long]);
    assert_eq!(parts(&connection.recv().await.unwrap()), [&b"second"[..]]);
    assert!(matches!(connection.recv().await, Err(ZmtpError::Io(_))));
}

#[tokio::test]
async fn messages_that_came_together_are_taken_together_and_an_error_waits_for_them() {
    let to = peer("PUB", 1, |mut stream| async move {
        let mut bytes = Vec::new();
        for i in 0..5u8 {
            bytes.extend(frames(&[b"t", &[i]]));
        }
        // More than one message may have.
        bytes.extend(frames(&[&b"x"[..]; MESSAGE_FRAMES_MAX + 1]));
        stream.write_all(&bytes).await.unwrap();
        hold(stream).await;
    })
    .await;
    let mut connection = Connection::open(&to, Role::Sub).await.unwrap();
    let mut taken = Vec::new();
    let error = loop {
        match connection.recv_many(12).await {
            // Four bytes of heads and two of bodies.
            Ok(messages) => {
                assert!(messages.len() <= 2);
                taken.extend(messages);
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ZmtpError::TooLarge));
    let numbers: Vec<u8> = taken.iter().map(|message| parts(message)[1][0]).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn a_command_between_the_frames_of_a_message_is_no_part_of_it() {
    let to = peer("PUB", 1, |mut stream| async move {
        let mut bytes = Vec::new();
        push_frame(&mut bytes, FLAG_MORE, b"t");
        push_frame(&mut bytes, FLAG_COMMAND, b"\x04PING\x00\x0a");
        push_frame(&mut bytes, 0, b"payload");
        stream.write_all(&bytes).await.unwrap();
        hold(stream).await;
    })
    .await;
    let mut connection = Connection::open(&to, Role::Sub).await.unwrap();
    let message = connection.recv().await.unwrap();
    assert_eq!(parts(&message), [&b"t"[..], b"payload"]);
    assert_eq!(message.shared_frames(), [&b"t"[..], b"payload"]);
}

#[tokio::test]
async fn an_announced_length_allocates_nothing() {
    let to = peer("PUB", 1, |mut stream| async move {
        let mut header = vec![FLAG_LONG];
        header.extend((1u64 << 62).to_be_bytes());
        stream.write_all(&header).await.unwrap();
        hold(stream).await;
    })
    .await;
    let mut connection = Connection::open(&to, Role::Sub).await.unwrap();
    assert!(matches!(connection.recv().await, Err(ZmtpError::TooLarge)));

    let to = peer("PUB", 1, |mut stream| async move {
        let part: &[u8] = b"x";
        stream.write_all(&frames(&[part; MESSAGE_FRAMES_MAX + 1])).await.unwrap();
        hold(stream).await;
    })
    .await;
    let mut connection = Connection::open(&to, Role::Sub).await.unwrap();
    assert!(matches!(connection.recv().await, Err(ZmtpError::TooLarge)));
}

#[tokio::test]
async fn a_wrong_peer_is_named() {
    let refused = async |to: Endpoint| match Connection::open(&to, Role::Sub).await {
        Err(ZmtpError::Peer(why)) => why,
        other => panic!("{other:?}"),
    };
    let http = raw_peer(|mut s| async move {
        s.write_all(b"HTTP/1.1 400 Bad Request\r\n").await.unwrap();
        hold(s).await;
    });
    assert_eq!(refused(http.await).await, "it does not speak ZeroMQ");
    let old = raw_peer(|mut s| async move {
        s.write_all(&[0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 1]).await.unwrap();
        hold(s).await;
    });
    assert!(refused(old.await).await.contains("older than 3.0"));
    let router = peer("ROUTER", 1, hold);
    assert_eq!(refused(router.await).await, "it is a ROUTER socket, not PUB");
    let curve = raw_peer(|mut s| async move {
        let mut theirs = greeting();
        theirs[12..17].copy_from_slice(b"CURVE");
        s.write_all(&theirs).await.unwrap();
        hold(s).await;
    });
    assert!(refused(curve.await).await.contains("CURVE"));
}

#[tokio::test]
async fn pings_are_answered_with_their_context() {
    let (heard, wait) = tokio::sync::oneshot::channel();
    let to = peer("ROUTER", 1, |mut stream| async move {
        let mut ping = Vec::new();
        push_frame(&mut ping, FLAG_COMMAND, b"\x04PING\x00\x0aabc");
        stream.write_all(&ping).await.unwrap();
        let mut input = vec![0; 1000];
        let mut len = 0;
        while !input[..len].ends_with(b"\x04PONGabc") {
            len += stream.read(&mut input[len..]).await.unwrap();
        }
        stream.write_all(&frames(&[b"done"])).await.unwrap();
        heard.send(()).unwrap();
    })
    .await;
    let mut connection = Connection::open(&to, Role::Dealer).await.unwrap();
    assert_eq!(parts(&connection.recv().await.unwrap()), [&b"done"[..]]);
    wait.await.unwrap();
}

#[tokio::test]
async fn silence_is_asked_and_then_given_up() {
    let to = peer("PUB", 1, hold).await;
    let mut connection = Connection::open(&to, Role::Sub).await.unwrap();
    tokio::time::pause();
    let before = Instant::now();
    assert!(matches!(connection.recv().await, Err(ZmtpError::Silent)));
    assert_eq!(before.elapsed().as_secs(), SILENCE_MAX.as_secs());
}

#[tokio::test]
async fn hostile_bytes_after_the_handshake_never_panic() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..200 {
        let mut bytes = Vec::new();
        for _ in 0..(round % 64) * 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Small values, so that flags and lengths often make frames.
            bytes.push((state >> 32) as u8 & if state & 1 == 0 { 0x07 } else { 0xff });
        }
        let to = peer("PUB", 1, move |mut stream| async move { drop(stream.write_all(&bytes).await) }).await;
        let Ok(mut connection) = Connection::open(&to, Role::Sub).await else { continue };
        while connection.recv().await.is_ok() {}
    }
}
