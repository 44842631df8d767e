//! How flows without a connection are told apart, where addresses and ports are not all.

use std::str::FromStr;

use patchswitch_common::maps::{CID, STATELESS};
use serde::{Deserialize, Serialize};

/// What is declared of a service's datagrams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagrams {
    /// UDP ports of which each datagram stands for itself, as those of DNS: with a switch all of them go to the new
    /// partition, and nothing is remembered. At most [`STATELESS`].
    pub stateless: Vec<u16>,
    /// A port of QUIC whose connection ids tell who made them.
    pub quic: Option<Quic>,
}

/// The form of connection ids that a server chooses (RFC 9000 5.1): a part of them says whose they are.
///
/// The part is learned from what the serving partition sends while connections are made, and must be another one for the
/// patched partition: a number of the process, a key that is made at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quic {
    /// The UDP port, not 0.
    pub port: u16,
    /// The byte of an id with which the part begins.
    pub cid_offset: u8,
    /// Its length in bytes, at most [`CID`].
    pub cid_len: u8,
    /// Which bits of it count; what is behind `cid_len` has no meaning.
    pub mask: [u8; CID],
}

/// A declaration that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDatagrams {
    /// Too many ports.
    #[error("{0} stateless ports are more than {STATELESS}")]
    Ports(usize),
    /// A port is 0, or is declared both ways.
    #[error("port {0} cannot be declared like that: 0 is none, and a port of QUIC has flows")]
    Port(u16),
    /// An id has no such part.
    #[error(
        "connection ids have no {len} bytes from byte {offset} on: the part has 1 to {CID}, within the 20 that an id has at \
         most"
    )]
    Part {
        /// Where it would begin.
        offset: u8,
        /// How long it would be.
        len: u8,
    },
    /// No bit counts, or the mask is no mask.
    #[error("{0:?} is no mask for {1} bytes: two hexadecimal digits for each, not all of them 0")]
    Mask(String, u8),
    /// Not of the form.
    #[error("{0:?} is not PORT:OFFSET:LENGTH or PORT:OFFSET:LENGTH:MASK, such as 443:0:8")]
    Form(String),
}

/// The longest connection id of version 1 (RFC 9000 17.2).
const LONGEST: u8 = 20;

impl Quic {
    /// A form of ids; without a mask all bits of the part count. The mask is in hexadecimal digits, two for each byte.
    ///
    /// # Errors
    /// [`BadDatagrams`].
    pub fn new(port: u16, cid_offset: u8, cid_len: u8, mask: Option<&str>) -> Result<Self, BadDatagrams> {
        if port == 0 {
            return Err(BadDatagrams::Port(port));
        }
        let fits = cid_offset.checked_add(cid_len).is_some_and(|end| end <= LONGEST);
        if cid_len == 0 || usize::from(cid_len) > CID || !fits {
            return Err(BadDatagrams::Part { offset: cid_offset, len: cid_len });
        }
        let bits = match mask {
            None => [0xff; CID],
            Some(text) => {
                parse_mask(text, cid_len).ok_or_else(|| BadDatagrams::Mask(text.to_owned(), cid_len))?
            }
        };
        Ok(Self { port, cid_offset, cid_len, mask: bits })
    }
}

fn parse_mask(text: &str, len: u8) -> Option<[u8; CID]> {
    if !text.is_ascii() || text.len() != usize::from(len) * 2 {
        return None;
    }
    let mut mask = [0; CID];
    for (byte, at) in mask.iter_mut().zip((0..text.len()).step_by(2)) {
        let digits = text.get(at..at + 2).filter(|digits| !digits.contains('+'))?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    (mask != [0; CID]).then_some(mask)
}

impl FromStr for Quic {
    type Err = BadDatagrams;

    fn from_str(text: &str) -> Result<Self, BadDatagrams> {
        let form = || BadDatagrams::Form(text.to_owned());
        let mut parts = text.split(':');
        let mut number = || parts.next().and_then(|part| part.parse::<u16>().ok()).ok_or_else(form);
        let (port, offset, len) = (number()?, number()?, number()?);
        let (mask, rest) = (parts.next(), parts.next());
        let [offset, len] = [offset, len].map(|number| u8::try_from(number).unwrap_or(u8::MAX));
        if rest.is_some() { Err(form()) } else { Self::new(port, offset, len, mask) }
    }
}

impl Datagrams {
    /// Whether it makes sense.
    ///
    /// # Errors
    /// [`BadDatagrams`].
    pub fn check(&self) -> Result<(), BadDatagrams> {
        if self.stateless.len() > STATELESS {
            return Err(BadDatagrams::Ports(self.stateless.len()));
        }
        let quic = self.quic.map(|quic| quic.port);
        match self.stateless.iter().find(|port| **port == 0 || Some(**port) == quic) {
            Some(port) => Err(BadDatagrams::Port(*port)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_of_ids_is_read_and_what_makes_no_sense_is_refused() {
        let quic: Quic = "443:0:8".parse().unwrap();
        assert_eq!(quic, Quic { port: 443, cid_offset: 0, cid_len: 8, mask: [0xff; CID] });
        let masked: Quic = "443:4:2:f00F".parse().unwrap();
        assert_eq!((masked.cid_offset, &masked.mask[..3]), (4, &[0xf0, 0x0f, 0][..]));
        for bad in [
            "",
            "443",
            "443:0",
            "443:0:8:ff",
            "443:0:1:gg",
            "443:0:1:+f",
            "443:0:1:00",
            "443:0:1:ff:",
            "0:0:8",
            "443:0:0",
            "443:0:17",
            "443:13:8",
            "443:300:1",
            "x:0:8",
            "65536:0:8",
            "443:0:1:ö",
        ] {
            assert!(bad.parse::<Quic>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_few_and_declared_once() {
        let of =
            |stateless: &[u16]| Datagrams { stateless: stateless.to_vec(), quic: "443:0:8".parse().ok() };
        assert_eq!(of(&[53, 123]).check(), Ok(()));
        assert_eq!(of(&[53, 443]).check(), Err(BadDatagrams::Port(443)));
        assert_eq!(of(&[0]).check(), Err(BadDatagrams::Port(0)));
        assert_eq!(of(&[9; 9]).check(), Err(BadDatagrams::Ports(9)));
    }
}
