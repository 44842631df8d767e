//! What hangs on a link besides qdiscs: filters of `clsact`, and XDP programs.

use futures_util::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use super::{Link, Netlink, NetlinkError, failed};

/// Where on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What comes from the wire.
    Ingress,
    /// What goes there.
    Egress,
}

/// A filter of a `clsact` qdisc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Filters with a smaller number see a packet first.
    pub priority: u16,
    /// What it is called: `bpf`, `flower`, …
    pub kind: String,
    /// The name that it was given; of a BPF program only.
    pub name: Option<String>,
    /// The number of its BPF program in the kernel. Classic BPF has none.
    pub program: Option<u32>,
}

/// Who runs an XDP program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// The device itself.
    Offloaded,
    /// The driver.
    Native,
    /// The kernel, behind the driver.
    Generic,
}

impl Netlink {
    /// The filters of a `clsact` qdisc, in the order in which packets meet them; none if there is no such qdisc.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn filters(&self, link: &Link, direction: Direction) -> Result<Vec<Filter>, NetlinkError> {
        let all = self.handle.traffic_filter(i32::try_from(link.index).unwrap_or_default()).get();
        let some = match direction {
            Direction::Ingress => all.ingress(),
            Direction::Egress => all.egress(),
        };
        let found: Vec<TcMessage> = some.execute().try_collect().await.map_err(failed("list filters"))?;
        // Each group of filters is listed as well, without a number of its own.
        let one = |message: &TcMessage| u32::from(message.header.handle) != 0;
        Ok(found.into_iter().filter(one).map(filter).collect())
    }

    /// The XDP programs of a link, by their numbers, in the order in which packets meet them.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn xdp(&self, link: &Link) -> Result<Vec<(XdpMode, u32)>, NetlinkError> {
        let request = self.handle.link().get().match_index(link.index);
        let found: Vec<LinkMessage> =
            request.execute().try_collect().await.map_err(failed(format!("look at {}", link.name)))?;
        let attributes = found.into_iter().flat_map(|message| message.attributes);
        let xdp = attributes.filter_map(|attribute| match attribute {
            LinkAttribute::Xdp(xdp) => Some(xdp),
            _ => None,
        });
        let mut programs: Vec<_> = xdp.flatten().filter_map(|attribute| xdp_program(&attribute)).collect();
        programs.sort_by_key(|(mode, _)| *mode as u8);
        Ok(programs)
    }
}

fn xdp_program(attribute: &LinkXdp) -> Option<(XdpMode, u32)> {
    match attribute {
        LinkXdp::HwProgId(id) => Some((XdpMode::Offloaded, *id)),
        LinkXdp::DrvProgId(id) => Some((XdpMode::Native, *id)),
        LinkXdp::SkbProgId(id) => Some((XdpMode::Generic, *id)),
        // `ProgId` names one of these once more.
        _ => None,
    }
}

fn filter(message: TcMessage) -> Filter {
    // The upper half; the lower one is the kind of packets that it is for (`TC_H_MAJ` of `tcm_info`).
    let priority = u16::try_from(message.header.info >> 16).unwrap_or_default();
    let mut filter = Filter { priority, kind: String::new(), name: None, program: None };
    for attribute in message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => filter.kind = kind,
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name = Some(name),
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = Some(id),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    filter
}
