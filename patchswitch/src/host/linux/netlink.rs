//! Links, addresses, neighbours; below, routes, qdiscs and namespace ids: the only place that speaks rtnetlink.
//!
//! A [`Netlink`] belongs to the network namespace in which its socket was opened. Every change is idempotent: what is
//! already so is no error, and neither is what is already gone.

mod hooks;
mod look;
mod nsid;
mod qdisc;
mod route;

pub use hooks::{Direction, Filter, XdpMode};
pub use route::{MAIN_TABLE, ROUTE_PROTOCOL, Selector};

use std::io;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, CacheInfo};
use netlink_packet_route::link::{
    LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, XdpAttached,
};
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{Handle, LinkUnspec, LinkVeth};

use super::netns::{Netns, NetnsError};

/// Why a change of the network failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No socket.
    #[error("failed to open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused a request.
    #[error("failed to {action}")]
    Request {
        /// What was asked, with the objects' names.
        action: String,
        /// What the kernel said.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// There is no such link.
    #[error("there is no network device {0:?}; `ip link` lists those there are")]
    NoLink(String),
    /// The kernel did not tell a namespace's id.
    #[error("failed to get an id for network namespace {0}")]
    NoNsid(String),
}

/// A link, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Link-layer address.
    pub mac: [u8; 6],
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
    /// Whether its frames are Ethernet's.
    pub ethernet: bool,
    /// What it is, if it is not a device of its own right: `veth`, `bond`, `vlan` …
    pub kind: Option<String>,
    /// Whether there is an XDP program on it.
    pub xdp: bool,
    /// Of a veth, its other end.
    pub peer: Option<Peer>,
}

/// The other end of a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its index in its namespace.
    pub index: u32,
    /// The id of its namespace, as seen from this one; nothing if it is in this one.
    pub nsid: Option<i32>,
}

/// A netlink connection into one network namespace.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

/// Names an action for an error, unless the kernel said that there was nothing to do.
fn unless(
    tolerated: i32,
    action: impl FnOnce() -> String,
) -> impl FnOnce(rtnetlink::Error) -> Result<(), NetlinkError> {
    move |error| match &error {
        rtnetlink::Error::NetlinkError(message) if message.to_io().raw_os_error() == Some(tolerated) => {
            Ok(())
        }
        _ => Err(NetlinkError::Request { action: action(), source: Box::new(error) }),
    }
}

fn failed(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    move |error| NetlinkError::Request { action: action.into(), source: Box::new(error) }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl Netlink {
    /// Opens a connection in a namespace. Must be called inside a tokio runtime, which then drives it.
    ///
    /// # Errors
    /// [`NetlinkError::Netns`] or [`NetlinkError::Open`].
    pub fn open(netns: &Netns) -> Result<Self, NetlinkError> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns
            .run(|| {
                let _entered = runtime.enter();
                rtnetlink::new_connection()
            })?
            .map_err(NetlinkError::Open)?;
        runtime.spawn(connection);
        Ok(Self { handle })
    }

    /// All links of the namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let messages = self.handle.link().get().execute();
        let found: Vec<_> = messages.try_collect().await.map_err(failed("list network devices"))?;
        Ok(found.into_iter().map(link).collect())
    }

    /// The link with this name.
    ///
    /// # Errors
    /// [`NetlinkError::NoLink`] or [`NetlinkError::Request`].
    pub async fn link(&self, name: &str) -> Result<Link, NetlinkError> {
        let found = self.links().await?.into_iter().find(|link| link.name == name);
        found.ok_or_else(|| NetlinkError::NoLink(name.to_owned()))
    }

    /// Makes a veth pair, both ends here and down.
    ///
    /// # Errors
    /// [`NetlinkError::Request`], also if one of the names is taken.
    pub async fn add_veth(&self, name: &str, peer: &str) -> Result<(), NetlinkError> {
        let message = LinkVeth::new(name, peer).build();
        self.handle.link().add(message).execute().await.map_err(failed(format!("make veth {name}")))
    }

    /// Moves a link into another namespace and gives it a new name there.
    ///
    /// # Errors
    /// [`NetlinkError::Request`], e.g. if the name is taken there.
    pub async fn move_link(&self, index: u32, to: &Netns, name: &str) -> Result<(), NetlinkError> {
        let message =
            LinkUnspec::new_with_index(index).setns_by_fd(to.raw_fd()).name(name.to_owned()).build();
        let action = format!("move a link into network namespace {to} as {name}");
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Gives a link that is down another name.
    ///
    /// # Errors
    /// [`NetlinkError::Request`], e.g. if the name is taken.
    pub async fn rename(&self, link: &Link, name: &str) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.index).name(name.to_owned()).build();
        let action = format!("name {} {name}", link.name);
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Sets what must be set while a link is down: its link-layer address, its MTU and a text for people.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn dress(&self, link: &Link, mac: [u8; 6], mtu: u32, alias: &str) -> Result<(), NetlinkError> {
        let message =
            LinkUnspec::new_with_index(link.index).address(mac.to_vec()).mtu(mtu).alias(alias).build();
        let action = format!("set address and MTU of {}", link.name);
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Makes a link a queue and nothing else: nobody is asked for addresses on it, and it takes so many frames. While it is
    /// down.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn make_queue(&self, link: &Link, length: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.index)
            .arp(false)
            .append_extra_attribute(LinkAttribute::TxQueueLen(length))
            .build();
        let action = format!("set the queue of {}", link.name);
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Sets the largest packet of a link.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn set_mtu(&self, link: &Link, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.index).mtu(mtu).build();
        let action = format!("set the MTU of {}", link.name);
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Sets a link up or down.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn set_up(&self, link: &Link, up: bool) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.index);
        let message = if up { message.up() } else { message.down() }.build();
        let action = format!("set {} {}", link.name, if up { "up" } else { "down" });
        self.handle.link().set(message).execute().await.map_err(failed(action))
    }

    /// Removes a link, and with a veth its other end.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn delete_link(&self, name: &str) -> Result<(), NetlinkError> {
        let link = match self.link(name).await {
            Err(NetlinkError::NoLink(_)) => return Ok(()),
            other => other?,
        };
        let done = self.handle.link().del(link.index).execute().await;
        done.or_else(unless(libc::ENODEV, || format!("remove network device {name}")))
    }

    /// All addresses of the namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn addresses(&self) -> Result<Vec<IpAddr>, NetlinkError> {
        let messages = self.handle.address().get().execute();
        let found: Vec<_> = messages.try_collect().await.map_err(failed("list addresses"))?;
        let address = |attribute| match attribute {
            AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => Some(ip),
            _ => None,
        };
        Ok(found.into_iter().flat_map(|m| m.attributes.into_iter().filter_map(address)).collect())
    }

    /// Adds a host address (/32 or /128) without duplicate address detection; `preferred` if it may be chosen as a
    /// source (IPv6 only: IPv4 ignores it).
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn add_address(
        &self,
        link: &Link,
        address: IpAddr,
        preferred: bool,
    ) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(link.index, address, width(address)).replace();
        let message = request.message_mut();
        if address.is_ipv6() {
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            let mut lifetime = CacheInfo::default();
            lifetime.ifa_valid = u32::MAX;
            lifetime.ifa_preferred = if preferred { u32::MAX } else { 0 };
            message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        }
        let action = format!("add {address} to {}", link.name);
        request.execute().await.map_err(failed(action))
    }

    /// Takes a host address off a link.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn delete_address(&self, link: &Link, address: IpAddr) -> Result<(), NetlinkError> {
        let message = self.handle.address().add(link.index, address, width(address)).message_mut().clone();
        let done = self.handle.address().del(message).execute().await;
        done.or_else(unless(libc::EADDRNOTAVAIL, || format!("take {address} off {}", link.name)))
    }

    /// Says for good which link-layer address a neighbour has.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn add_neighbour(
        &self,
        link: &Link,
        address: IpAddr,
        mac: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add(link.index, address)
            .link_layer_address(&mac)
            .state(NeighbourState::Permanent)
            .replace();
        request.execute().await.map_err(failed(format!("add neighbour {address} on {}", link.name)))
    }

    /// Ends [`Netlink::add_neighbour`].
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn delete_neighbour(&self, link: &Link, address: IpAddr) -> Result<(), NetlinkError> {
        let message = self.handle.neighbours().add(link.index, address).message_mut().clone();
        let done = self.handle.neighbours().del(message).execute().await;
        done.or_else(unless(libc::ENOENT, || format!("forget neighbour {address} on {}", link.name)))
    }

    /// Makes the host answer ARP or NDP for exactly this address on a link.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn add_proxy(&self, link: &Link, address: IpAddr) -> Result<(), NetlinkError> {
        let request =
            self.handle.neighbours().add(link.index, address).flags(NeighbourFlags::Proxy).replace();
        request.execute().await.map_err(failed(format!("answer for {address} on {}", link.name)))
    }

    /// Ends [`Netlink::add_proxy`].
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn delete_proxy(&self, link: &Link, address: IpAddr) -> Result<(), NetlinkError> {
        let mut request = self.handle.neighbours().add(link.index, address).flags(NeighbourFlags::Proxy);
        let message = request.message_mut().clone();
        let done = self.handle.neighbours().del(message).execute().await;
        done.or_else(unless(libc::ENOENT, || format!("stop answering for {address} on {}", link.name)))
    }

    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, rtnetlink::Error> {
        use futures_util::StreamExt;
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(packet)?;
        let mut inner = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
                NetlinkPayload::InnerMessage(message) => inner.push(message),
                _ => {}
            }
        }
        Ok(inner)
    }
}

fn link(message: LinkMessage) -> Link {
    let mut found = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        kind: None,
        xdp: false,
        peer: None,
    };
    let (mut peer, mut nsid) = (None, None);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name = name,
            LinkAttribute::Mtu(mtu) => found.mtu = mtu,
            LinkAttribute::Address(mac) => found.mac = mac.try_into().unwrap_or_default(),
            LinkAttribute::Link(index) => peer = Some(index),
            LinkAttribute::LinkNetNsId(id) => nsid = Some(id),
            LinkAttribute::LinkInfo(all) => {
                found.kind = all.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::Xdp(all) => {
                let is = |one: &LinkXdp| matches!(one, LinkXdp::Attached(mode) if *mode != XdpAttached::None);
                found.xdp = all.iter().any(is);
            }
            _ => {}
        }
    }
    found.peer = peer.filter(|_| found.kind.as_deref() == Some("veth")).map(|index| Peer { index, nsid });
    found
}
