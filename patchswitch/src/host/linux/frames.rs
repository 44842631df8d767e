//! Whole frames on a link (`packet(7)`).

use std::io;

use pnet::datalink::{self, Channel, Config, MacAddr, NetworkInterface};

use super::netlink::Link;

/// Sends frames as they are on a link of the calling thread's namespace. Root only.
///
/// # Errors
/// What the kernel said; frames before the one that it refused have been sent.
pub fn send(link: &Link, frames: &[Vec<u8>]) -> io::Result<()> {
    let interface = NetworkInterface {
        name: link.name.clone(),
        description: String::new(),
        index: link.index,
        mac: Some(MacAddr::from(link.mac)),
        ips: Vec::new(),
        flags: 0,
    };
    // Nothing is to be read, least of all what was for others.
    let config = Config { promiscuous: false, read_buffer_size: 0, ..Config::default() };
    let Channel::Ethernet(mut sender, _) = datalink::channel(&interface, config)? else {
        return Err(io::ErrorKind::Unsupported.into());
    };
    for frame in frames {
        match sender.send_to(frame, None) {
            Some(result) => result?,
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
    }
    Ok(())
}
