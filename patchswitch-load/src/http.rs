//! As much of HTTP/1.1 (RFC 9112) as a client of known servers and a test server need. Pure: bytes in, heads out.
//!
//! Bodies end by `Content-Length` or with the connection. Chunked bodies are refused: the files that are asked for
//! here never come so, and a body that is not understood must not pass for a complete one.

use std::fmt::Write as _;

/// The longest head that is read.
pub const HEAD_MAX: usize = 16 * 1024;

/// The header by which a server names itself; the client trusts it over everything else.
pub const INSTANCE_HEADER: &str = "X-Instance";

/// The head of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerHead {
    /// Its status.
    pub status: u16,
    /// The length of the body; none if it ends with the connection.
    pub body: Option<u64>,
    /// Whether the server closes the connection after it.
    pub close: bool,
    /// The value of [`INSTANCE_HEADER`].
    pub instance: Option<String>,
    /// The value of `Server`.
    pub server: Option<String>,
    /// Bytes of the head, the empty line included.
    pub length: usize,
}

/// The head of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuestionHead {
    /// `GET`, …
    pub method: String,
    /// The target up to the question mark.
    pub path: String,
    /// What follows it.
    pub query: String,
    /// Whether the client wants the connection closed after the answer.
    pub close: bool,
    /// Bytes of the head, the empty line included.
    pub length: usize,
}

/// Bytes that are no head.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// No empty line within [`HEAD_MAX`].
    #[error("no end of the head within {HEAD_MAX} bytes")]
    TooLong,
    /// The first line is not HTTP/1.
    #[error("first line {0:?}")]
    FirstLine(String),
    /// A header line without a colon, or a length that is no number.
    #[error("header line {0:?}")]
    Header(String),
    /// A body that is coded in a way that is not understood here.
    #[error("transfer coding {0:?}")]
    Coding(String),
}

/// Reads the head of an answer; none while it is incomplete.
///
/// # Errors
/// [`HeadError`] if it cannot become one.
pub fn parse_answer(bytes: &[u8]) -> Result<Option<AnswerHead>, HeadError> {
    let Some((text, length)) = split_head(bytes)? else { return Ok(None) };
    let (first, headers) = text.split_once("\r\n").unwrap_or((&text, ""));
    let bad = || HeadError::FirstLine(shorten(first));
    let rest = first.strip_prefix("HTTP/1.").ok_or_else(bad)?;
    let (minor, rest) = rest.split_once(' ').ok_or_else(bad)?;
    let status = rest.split(' ').next().and_then(|word| word.parse().ok()).ok_or_else(bad)?;
    let mut head =
        AnswerHead { status, body: None, close: minor == "0", instance: None, server: None, length };
    for line in headers.split("\r\n").filter(|line| !line.is_empty()) {
        let (name, value) = header(line)?;
        if name.eq_ignore_ascii_case("content-length") {
            head.body = Some(value.parse().ok().ok_or_else(|| HeadError::Header(shorten(line)))?);
        } else if name.eq_ignore_ascii_case("connection") {
            head.close = says_close(value);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(HeadError::Coding(shorten(value)));
        } else if name.eq_ignore_ascii_case(INSTANCE_HEADER) {
            head.instance = Some(shorten(value));
        } else if name.eq_ignore_ascii_case("server") {
            head.server = Some(shorten(value));
        }
    }
    // RFC 9112, section 6.3: without a length the body ends with the connection.
    head.close |= head.body.is_none();
    Ok(Some(head))
}

/// Reads the head of a question; none while it is incomplete.
///
/// # Errors
/// [`HeadError`] if it cannot become one.
pub fn parse_question(bytes: &[u8]) -> Result<Option<QuestionHead>, HeadError> {
    let Some((text, length)) = split_head(bytes)? else { return Ok(None) };
    let (first, headers) = text.split_once("\r\n").unwrap_or((&text, ""));
    let bad = || HeadError::FirstLine(shorten(first));
    let mut words = first.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(bad());
    };
    let minor = version.strip_prefix("HTTP/1.").ok_or_else(bad)?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut close = minor == "0";
    for line in headers.split("\r\n").filter(|line| !line.is_empty()) {
        let (name, value) = header(line)?;
        if name.eq_ignore_ascii_case("connection") {
            close = says_close(value);
        }
    }
    Ok(Some(QuestionHead { method: method.into(), path: path.into(), query: query.into(), close, length }))
}

/// The value of a key in a query such as `n=5&rate=7`.
pub fn query_value<'a>(query: &'a str, key: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.split_once('=').filter(|(k, _)| *k == key).map(|(_, v)| v))
}

/// A question. The request's number is part of its target, so that it is found again in the server's log.
pub fn question(path: &str, host: &str, number: u64, close: bool) -> String {
    let joint = if path.contains('?') { '&' } else { '?' };
    let mut text = format!("GET {path}{joint}request={number} HTTP/1.1\r\nHost: {host}\r\n");
    if close {
        text.push_str("Connection: close\r\n");
    }
    text.push_str("\r\n");
    text
}

/// The head of an answer of the test server.
pub fn answer_head(status: u16, instance: &str, body: u64, close: bool) -> String {
    let reason = match status {
        200 => "OK",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Bad Request",
    };
    let mut text = format!("HTTP/1.1 {status} {reason}\r\nServer: patchswitch-load\r\n");
    // Writing to a string does not fail.
    let written = write!(text, "{INSTANCE_HEADER}: {instance}\r\nContent-Length: {body}\r\n");
    debug_assert!(written.is_ok());
    if close {
        text.push_str("Connection: close\r\n");
    }
    text.push_str("\r\n");
    text
}

fn split_head(bytes: &[u8]) -> Result<Option<(String, usize)>, HeadError> {
    let limit = bytes.len().min(HEAD_MAX);
    match bytes[..limit].windows(4).position(|four| four == b"\r\n\r\n") {
        Some(end) => Ok(Some((String::from_utf8_lossy(&bytes[..end]).into_owned(), end + 4))),
        None if bytes.len() >= HEAD_MAX => Err(HeadError::TooLong),
        None => Ok(None),
    }
}

fn header(line: &str) -> Result<(&str, &str), HeadError> {
    line.split_once(':')
        .map(|(name, value)| (name, value.trim()))
        .ok_or_else(|| HeadError::Header(shorten(line)))
}

fn says_close(value: &str) -> bool {
    value.split(',').any(|word| word.trim().eq_ignore_ascii_case("close"))
}

/// What somebody else wrote goes into reports, but not without limit.
pub(crate) fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Result<Option<AnswerHead>, HeadError> {
        parse_answer(text.as_bytes())
    }

    #[test]
    fn an_answer_of_nginx_is_read() {
        let text = "HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\ncontent-LENGTH: 615\r\nConnection: keep-alive\r\n\r\nbody";
        let head = answer(text).unwrap().unwrap();
        assert_eq!((head.status, head.body, head.close), (200, Some(615), false));
        assert_eq!(head.server.as_deref(), Some("nginx/1.22.1"));
        assert_eq!(&text[head.length..], "body");
    }

    #[test]
    fn an_incomplete_head_is_waited_for_wherever_it_is_cut() {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        for cut in 0..text.len() {
            assert_eq!(answer(&text[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(answer(text).unwrap().unwrap().body, Some(0));
    }

    #[test]
    fn the_end_of_a_connection_is_announced_in_four_ways() {
        for (text, close) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: Close\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: foo, close\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\n\r\n", true),
        ] {
            assert_eq!(answer(text).unwrap().unwrap().close, close, "{text}");
        }
    }

    #[test]
    fn what_is_no_answer_is_refused_with_the_reason() {
        for text in ["SSH-2.0-x\r\n\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "HTTP/1.1\r\n\r\n"] {
            assert!(matches!(answer(text), Err(HeadError::FirstLine(_))), "{text}");
        }
        assert!(matches!(answer("HTTP/1.1 200 OK\r\nno colon\r\n\r\n"), Err(HeadError::Header(_))));
        assert!(matches!(answer("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), Err(HeadError::Header(_))));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(answer(chunked), Err(HeadError::Coding("chunked".into())));
        assert_eq!(parse_answer(&[b'a'; HEAD_MAX]), Err(HeadError::TooLong));
        assert_eq!(parse_answer(&[b'a'; HEAD_MAX - 1]), Ok(None));
    }

    #[test]
    fn what_the_client_asks_the_server_understands() {
        for (path, close) in [("/id", true), ("/bytes?n=5", false)] {
            let text = question(path, "host", 17, close);
            let head = parse_question(text.as_bytes()).unwrap().unwrap();
            assert_eq!((head.method.as_str(), head.close, head.length), ("GET", close, text.len()));
            assert_eq!(head.path, path.split('?').next().unwrap());
            assert_eq!(query_value(&head.query, "request"), Some("17"));
        }
        assert_eq!(query_value("n=5&rate=7", "rate"), Some("7"));
        assert_eq!(query_value("n=5&rate=7", "ra"), None);
        assert!(parse_question(b"GET /\r\n\r\n").is_err());
    }

    #[test]
    fn what_the_server_answers_the_client_understands() {
        let text = answer_head(200, "blue", 12, true);
        let head = answer(&text).unwrap().unwrap();
        assert_eq!((head.status, head.body, head.close), (200, Some(12), true));
        assert_eq!(head.instance.as_deref(), Some("blue"));
    }
}
