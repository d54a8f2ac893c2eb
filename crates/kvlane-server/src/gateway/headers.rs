//! What of a message's headers is passed on.

use hyper::header::{self, HeaderMap, HeaderName};

/// Headers that concern one connection only (RFC 9110, 7.6.1), and `expect`, which is answered here.
static HOP_BY_HOP: [HeaderName; 10] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// Removes what must not go beyond this connection.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    for name in named_by_connection(headers) {
        headers.remove(name);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// A copy of what goes beyond this connection. `host` stays behind, too: each engine has its own.
pub(crate) fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let named = named_by_connection(headers);
    // With room for what is added on the way.
    let mut copy = HeaderMap::with_capacity(headers.keys_len() + 2);
    for (name, value) in headers {
        if *name != header::HOST && !HOP_BY_HOP.contains(name) && !named.contains(name) {
            copy.append(name.clone(), value.clone());
        }
    }
    copy
}

/// Headers that `connection` says concern this connection only.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A client must not strip what frames or names the request.
        .filter(|name| *name != header::HOST && *name != header::CONTENT_LENGTH)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_what_connection_names_and_keeps_the_rest() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Gone"),
            ("x-gone", "1"),
            ("x-kept", "1"),
            ("transfer-encoding", "chunked"),
            ("authorization", "Bearer x"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let copy = end_to_end(&headers);
        strip_hop_by_hop(&mut headers);
        assert_eq!(copy, headers);
        let left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(headers.contains_key("x-kept") && headers.contains_key("authorization"));
    }
}
