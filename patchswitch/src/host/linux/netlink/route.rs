//! Routes and routing rules.

use std::fmt;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use netlink_packet_route::route::{RouteProtocol, RouteScope};
use netlink_packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::RouteMessageBuilder;

use super::{Link, Netlink, NetlinkError, failed, unless, width};

/// The origin of every route that patchswitch makes (`rtm_protocol`, a number from the range left to users).
pub const ROUTE_PROTOCOL: u8 = 117;
/// The main routing table.
pub const MAIN_TABLE: u32 = 254;

/// Which packets a routing rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selector {
    /// Those with this source address.
    From(IpAddr),
    /// Those of one family with this mark.
    Mark {
        /// The mark.
        mark: u32,
        /// Whether of IPv6.
        v6: bool,
    },
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From(source) => write!(f, "from {source}"),
            Self::Mark { mark, .. } => write!(f, "with the mark {mark:#x}"),
        }
    }
}

impl Netlink {
    /// Routes one host address to a link, instead of wherever it was routed in this table.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn route_host(&self, table: u32, address: IpAddr, link: &Link) -> Result<(), NetlinkError> {
        let builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(address, width(address))
            .map_err(|_prefix_too_long| NetlinkError::NoLink(link.name.clone()))?
            .table_id(table)
            .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
            .output_interface(link.index);
        let builder = if address.is_ipv4() { builder.scope(RouteScope::Link) } else { builder };
        let action = format!("route {address} to {}", link.name);
        self.handle.route().add(builder.build()).replace().execute().await.map_err(failed(action))
    }

    /// Removes the host route of an address that [`Netlink::route_host`] made in the main table.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn unroute_host(&self, address: IpAddr) -> Result<(), NetlinkError> {
        let builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(address, width(address))
            .map_err(|_prefix_too_long| NetlinkError::NoLink(address.to_string()))?
            .protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
        let builder = if address.is_ipv4() { builder.scope(RouteScope::NoWhere) } else { builder };
        let done = self.handle.route().del(builder.build()).execute().await;
        done.or_else(unless(libc::ESRCH, || format!("remove the route of {address}")))
    }

    /// Sets the default route of a table through a gateway that is on the link whatever its address is.
    ///
    /// `source` is the address that unbound sockets get: what the kernel chooses per packet for UDP.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn default_route(
        &self,
        table: u32,
        gateway: IpAddr,
        link: &Link,
        source: Option<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let unspecified = match gateway {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0; 16]),
        };
        let bad = |_| NetlinkError::NoLink(link.name.clone());
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(unspecified, 0)
            .map_err(bad)?
            .gateway(gateway)
            .map_err(bad)?
            .output_interface(link.index)
            .table_id(table)
            .onlink()
            .protocol(RouteProtocol::Other(ROUTE_PROTOCOL));
        if let Some(source) = source {
            builder = builder.pref_source(source).map_err(bad)?;
        }
        let action = format!("set the default route through {}", link.name);
        self.handle.route().add(builder.build()).replace().execute().await.map_err(failed(action))
    }

    /// Packets of a selection are routed by `table`.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn add_rule(&self, what: Selector, table: u32, priority: u32) -> Result<(), NetlinkError> {
        let add = self.handle.rule().add().table_id(table).priority(priority).action(RuleAction::ToTable);
        let done = match what {
            Selector::From(IpAddr::V4(source)) => add.v4().source_prefix(source, 32).execute().await,
            Selector::From(IpAddr::V6(source)) => add.v6().source_prefix(source, 128).execute().await,
            Selector::Mark { mark, v6: false } => add.fw_mark(mark).v4().execute().await,
            Selector::Mark { mark, v6: true } => add.fw_mark(mark).v6().execute().await,
        };
        done.or_else(unless(libc::EEXIST, || format!("add a rule for packets {what}")))
    }

    /// Removes all rules of [`Netlink::add_rule`] that name a table.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn delete_rules(&self, table: u32, priority: u32) -> Result<(), NetlinkError> {
        for family in [rtnetlink::IpVersion::V4, rtnetlink::IpVersion::V6] {
            let found = self.handle.rule().get(family).execute().try_collect::<Vec<_>>().await;
            for rule in found.map_err(failed("list rules"))? {
                let ours = rule.attributes.contains(&RuleAttribute::Priority(priority))
                    && rule.attributes.contains(&RuleAttribute::Table(table));
                if ours {
                    let done = self.handle.rule().del(rule).execute().await;
                    done.or_else(unless(libc::ENOENT, || format!("remove a rule of table {table}")))?;
                }
            }
        }
        Ok(())
    }
}
