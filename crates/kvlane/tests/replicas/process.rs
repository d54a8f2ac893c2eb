//! `kvlane` processes on loopback, and an HTTP client for them: what a test needs to start, ask, stop and kill them.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than this nothing takes here, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A free port for a process that others must know before it runs. Nobody holds it until then.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("it is bound")
}

/// A running process; killed, not asked, when it is dropped.
pub struct Process {
    child: Child,
    pub at: SocketAddr,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// Starts `kvlane` and waits until `address` finds in a line where it listens: engines say so on standard output, others in their log.
    fn start(arguments: &[String], address: impl Fn(&str) -> Option<SocketAddr>) -> Self {
        let engine = arguments[0] == "mock-engine";
        let (stdout, stderr) =
            if engine { (Stdio::piped(), Stdio::null()) } else { (Stdio::null(), Stdio::piped()) };
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvlane"))
            .args(arguments)
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .expect("the command starts");
        let said: Box<dyn Read + Send> = match (child.stdout.take(), child.stderr.take()) {
            (Some(stdout), _) => Box::new(stdout),
            (None, stderr) => Box::new(stderr.expect("one of them is piped")),
        };
        let mut lines = BufReader::new(said).lines().map_while(Result::ok);
        let at = lines.find_map(|line| address(&line));
        let at = at.unwrap_or_else(|| panic!("{arguments:?} ended without listening"));
        // Read to the end, or the process would wait for it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, at }
    }

    /// An engine that is so many times as fast as the measured one.
    pub fn engine(speed: f64, more: &[&str]) -> Self {
        let mut arguments = words("mock-engine --listen 127.0.0.1:0");
        arguments.extend([format!("--speed={speed}")]);
        arguments.extend(more.iter().map(ToString::to_string));
        Self::start(&arguments, |line| {
            let said: Value = serde_json::from_str(line).ok()?;
            said["url"].as_str()?.strip_prefix("http://")?.parse().ok()
        })
    }

    /// A router at `at` over `engines`, one of several at `peers`.
    pub fn router(at: SocketAddr, engines: &[Self], peers: &[SocketAddr], more: &str) -> Self {
        let mut arguments = words(&format!("serve --listen {at} --drain 0 {more}"));
        arguments.extend(engines.iter().map(|engine| format!("--worker=http://{}", engine.at)));
        arguments.extend(peers.iter().map(|peer| format!("--peer=http://{peer}")));
        let router = Self::start(&arguments, |line| {
            line.split_once(" listening address=")?.1.split(' ').next()?.parse().ok()
        });
        until("it is ready", || ask(router.at, "GET", "/ready", None).is_ok_and(|(status, _)| status == 200));
        router
    }

    /// `STOP` or `CONT`: what a stalled machine looks like from outside.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "kill -{name}");
    }

    pub fn get(&self, path: &str) -> Value {
        ask(self.at, "GET", path, None).expect("it answers").1
    }

    /// A request that runs until what is returned is dropped, and the engine that serves it.
    pub fn begin(&self, prompt: &[u32]) -> (TcpStream, String) {
        let body = json!({"model": "mock", "prompt": prompt, "max_tokens": 4000, "stream": true, "ignore_eos": true});
        let mut stream = send(self.at, "POST", "/v1/completions", Some(&body)).expect("it listens");
        let head = head(&mut stream).expect("it answers");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let worker = head.lines().find_map(|line| line.strip_prefix("x-kvlane-worker: "));
        let worker = worker.expect("the worker is named").to_owned();
        (stream, worker)
    }

    /// Sums of a figure over all workers.
    pub fn sum(&self, figure: &str) -> u64 {
        let workers = self.get("/kvlane/workers");
        let rows = workers["workers"].as_array().expect("workers").iter();
        rows.map(|row| row[figure].as_u64().unwrap_or(0)).sum()
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Waits until `holds`.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn send(to: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )?;
    Ok(stream)
}

/// The head of an answer; what follows is left in the stream.
fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// One request on a connection of its own: status, and body as JSON where it is some.
pub fn ask(to: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> std::io::Result<(u16, Value)> {
    let mut stream = send(to, method, path, body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let broken = || std::io::Error::other(format!("no HTTP: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(broken)?;
    let status = head.get(9..12).and_then(|status| status.parse().ok()).ok_or_else(broken)?;
    Ok((status, serde_json::from_str(body).unwrap_or(Value::Null)))
}
