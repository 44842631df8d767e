//! Probe by HTTP/1.1 (RFC 9112): one GET on a connection of its own, and as much of the answer as it takes to judge.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::Instant;

use super::connect::{connect, limit};
use super::{Reach, Stop};

/// The most that is read of an answer's head, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// The most that is read of an answer's body, in bytes.
const BODY_MAX: usize = 1 << 20;

/// What is asked for, and what counts as success.
pub(super) struct Wanted<'a> {
    pub(super) path: &'a str,
    pub(super) host: Option<&'a str>,
    pub(super) status: u16,
    pub(super) contains: Option<&'a str>,
}

pub(super) fn get(
    address: SocketAddr,
    wanted: &Wanted<'_>,
    reach: Reach<'_>,
    end: Instant,
) -> Result<(), Stop> {
    let mut stream = connect(address, reach, end)?;
    let failed = |error: &std::io::Error| {
        let late = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        let what = if late { "did not answer in time".to_owned() } else { format!("broke off: {error}") };
        Stop::Fail(format!("{address} {what}"))
    };
    let request = request(address, wanted);
    limit(&stream, end)
        .and_then(|()| stream.write_all(request.as_bytes()))
        .map_err(|error| failed(&error))?;
    let mut bytes = Vec::new();
    let mut piece = [0; 16 << 10];
    loop {
        let count = match limit(&stream, end).and_then(|()| stream.read(&mut piece)) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(&error)),
        };
        bytes.extend_from_slice(piece.get(..count).unwrap_or_default());
        let answer = match examine(&bytes, count == 0) {
            Ok(Some(answer)) => answer,
            Ok(None) => continue,
            Err(reason) => return Err(Stop::Fail(format!("{address} {reason}"))),
        };
        return judge(&answer, wanted).map_err(|reason| Stop::Fail(format!("{address} {reason}")));
    }
}

fn request(address: SocketAddr, wanted: &Wanted<'_>) -> String {
    // An IPv6 address has its brackets already.
    let host = wanted.host.map_or_else(|| address.to_string(), str::to_owned);
    let path = wanted.path;
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: patchswitch/{version}\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    )
}

/// An answer that is complete, or longer than anybody wants to read.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    body: Vec<u8>,
}

fn judge(answer: &Answer, wanted: &Wanted<'_>) -> Result<(), String> {
    if answer.status != wanted.status {
        return Err(format!("answered with status {} instead of {}", answer.status, wanted.status));
    }
    match wanted.contains {
        Some(text) if !answer.body.windows(text.len()).any(|part| part == text.as_bytes()) => {
            Err(format!("answered without {text:?} in the body"))
        }
        _ => Ok(()),
    }
}

/// Looks at what has arrived so far: an answer, nothing yet, or a reason why there will be none.
fn examine(bytes: &[u8], closed: bool) -> Result<Option<Answer>, String> {
    let mut rest = bytes;
    loop {
        let Some((head, body)) = split_head(rest) else {
            return match (closed, rest.len() > HEAD_MAX) {
                (true, _) if bytes.is_empty() => Err("closed the connection without an answer".to_owned()),
                (true, _) => Err(CUT.to_owned()),
                (false, true) => Err(format!("sent a head of more than {HEAD_MAX} bytes")),
                (false, false) => Ok(None),
            };
        };
        let head = Head::parse(head)?;
        if (100..200).contains(&head.status) {
            // An interim answer; the final one follows.
            rest = body;
            continue;
        }
        let status = head.status;
        let (body, complete) = head.body(body)?;
        let complete = complete || body.len() >= BODY_MAX || (closed && head.until_close());
        return match (complete, closed) {
            (true, _) => Ok(Some(Answer { status, body })),
            (false, true) => Err(CUT.to_owned()),
            (false, false) => Ok(None),
        };
    }
}

const CUT: &str = "closed the connection in the middle of its answer";

/// Splits after the empty line. A bare line feed ends a line as well (RFC 9112, section 2.2).
fn split_head(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut start = 0;
    while let Some(length) = bytes.get(start..)?.iter().position(|byte| *byte == b'\n') {
        let line = bytes.get(start..start + length)?;
        let next = start + length + 1;
        if line.is_empty() || line == b"\r" {
            return Some((bytes.get(..start)?, bytes.get(next..)?));
        }
        start = next;
    }
    None
}

struct Head {
    status: u16,
    length: Option<usize>,
    chunked: bool,
}

impl Head {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.lines();
        let status = lines.next().and_then(status_line).ok_or("did not answer in HTTP/1.1")?;
        let mut head = Self { status, length: None, chunked: false };
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("transfer-encoding") {
                head.chunked = value.trim().eq_ignore_ascii_case("chunked");
            } else if name.eq_ignore_ascii_case("content-length") {
                let length = value.trim().parse().map_err(|_no| "sent a bad Content-Length")?;
                if head.length.is_some_and(|other| other != length) {
                    return Err("sent two different lengths".to_owned());
                }
                head.length = Some(length);
            }
        }
        Ok(head)
    }

    fn has_body(&self) -> bool {
        !matches!(self.status, 204 | 304)
    }

    fn until_close(&self) -> bool {
        !self.chunked && self.length.is_none()
    }

    /// What there is of the body, at most [`BODY_MAX`] and a piece, and whether it is all.
    fn body(&self, bytes: &[u8]) -> Result<(Vec<u8>, bool), String> {
        if !self.has_body() {
            return Ok((Vec::new(), true));
        }
        if self.chunked {
            return chunks(bytes);
        }
        let length = self.length.unwrap_or(usize::MAX);
        let part = bytes.get(..length).unwrap_or(bytes);
        Ok((part.to_vec(), part.len() == length))
    }
}

/// `HTTP/1.1 200 OK`
fn status_line(line: &str) -> Option<u16> {
    let rest = line.strip_prefix("HTTP/1.")?;
    let (minor, rest) = rest.split_once(' ')?;
    let code = rest.split(' ').next()?;
    let digits = |text: &str, count| text.len() == count && text.bytes().all(|b| b.is_ascii_digit());
    if digits(minor, 1) && digits(code, 3) { code.parse().ok() } else { None }
}

/// Takes chunked framing off (RFC 9112, section 7.1). Trailers are not read.
fn chunks(bytes: &[u8]) -> Result<(Vec<u8>, bool), String> {
    let bad = || "sent a bad chunk".to_owned();
    let mut body = Vec::new();
    let mut rest = bytes;
    loop {
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            return if rest.len() > 1024 { Err(bad()) } else { Ok((body, false)) };
        };
        let line = String::from_utf8_lossy(rest.get(..end).unwrap_or_default()).into_owned();
        let size = line.split(';').next().unwrap_or_default().trim();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let size = usize::from_str_radix(size, 16).map_err(|_too_large| bad())?;
        if size == 0 {
            return Ok((body, true));
        }
        rest = rest.get(end + 1..).unwrap_or_default();
        body.extend_from_slice(rest.get(..size).unwrap_or(rest));
        let Some(after) = rest.get(size..) else { return Ok((body, false)) };
        rest = match after {
            [b'\r', b'\n', after @ ..] | [b'\n', after @ ..] => after,
            [] | [b'\r'] => return Ok((body, false)),
            _ => return Err(bad()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Result<Option<Answer>, String> {
        Ok(Some(Answer { status, body: body.as_bytes().to_vec() }))
    }

    #[test]
    fn whole_answers_of_every_framing_are_read() {
        for (text, closed, status, body) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", false, 200, "hi"),
            ("HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nhi and more", false, 200, "hi"),
            ("HTTP/1.0 404 Not Found\r\n\r\nnone", true, 404, "none"),
            ("HTTP/1.1 200\n\n", true, 200, ""),
            ("HTTP/1.1 204 No Content\r\n\r\n", false, 204, ""),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nhi\r\n1\r\n!\r\n0\r\n\r\n",
                false,
                200,
                "hi!",
            ),
            (
                "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
                false,
                200,
                "",
            ),
        ] {
            assert_eq!(examine(text.as_bytes(), closed), answer(status, body), "{text}");
        }
    }

    #[test]
    fn every_beginning_of_an_answer_waits_while_open_and_is_cut_when_closed() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
        ] {
            // The last line of chunked framing is judged by its size alone.
            let whole = text.len() - usize::from(text.ends_with("0\r\n"));
            for cut in 1..whole.saturating_sub(1) {
                assert_eq!(examine(&text.as_bytes()[..cut], false), Ok(None), "{:?}", &text[..cut]);
                assert_eq!(examine(&text.as_bytes()[..cut], true), Err(CUT.to_owned()), "{:?}", &text[..cut]);
            }
            assert!(matches!(examine(text.as_bytes(), false), Ok(Some(_))));
        }
    }

    #[test]
    fn what_is_not_http_is_a_failure_at_once() {
        for text in [
            "SSH-2.0-OpenSSH_9.2\r\n\r\n",
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        ] {
            assert!(examine(text.as_bytes(), false).is_err(), "{text}");
        }
        assert!(examine(&vec![b'a'; HEAD_MAX + 1], false).is_err());
    }

    #[test]
    fn an_endless_body_is_read_to_the_limit_only() {
        let mut bytes = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        bytes.resize(bytes.len() + BODY_MAX, b'a');
        assert!(matches!(examine(&bytes, false), Ok(Some(_))));
    }

    #[test]
    fn the_request_names_an_ipv6_host_in_brackets() {
        let wanted = Wanted { path: "/a?b", host: None, status: 200, contains: None };
        let request = request("[2001:db8::1]:81".parse().unwrap(), &wanted);
        assert!(request.starts_with("GET /a?b HTTP/1.1\r\nHost: [2001:db8::1]:81\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n"));
    }

    proptest::proptest! {
        #[test]
        fn no_answer_is_a_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400), closed: bool) {
            let _ = examine(&bytes, closed);
            for head in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"] {
                let _ = examine(&[head.as_bytes(), &bytes].concat(), closed);
            }
        }
    }
}
