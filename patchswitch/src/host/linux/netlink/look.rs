//! What is there: asked before something is mended, so that it can be said what was wrong.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use rtnetlink::RouteMessageBuilder;

use super::{Link, MAIN_TABLE, Netlink, NetlinkError, ROUTE_PROTOCOL, failed, width};

impl Netlink {
    /// Whether an address is on a link; if so, whether it may be chosen as a source (IPv4 addresses always may).
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn address_on(&self, link: &Link, address: IpAddr) -> Result<Option<bool>, NetlinkError> {
        let messages = self.handle.address().get().set_link_index_filter(link.index).execute();
        let found: Vec<_> = messages.try_collect().await.map_err(failed("list addresses"))?;
        let is_it = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => *ip == address,
            _ => false,
        };
        let message = found
            .into_iter()
            .find(|message| message.header.index == link.index && message.attributes.iter().any(is_it));
        let deprecated = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::CacheInfo(lifetime) => lifetime.ifa_preferred == 0,
            _ => false,
        };
        Ok(message.map(|message| !message.attributes.iter().any(deprecated)))
    }

    /// How many frames a link did not send because there was no room for them; 0 if it is gone.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn dropped(&self, link: &Link) -> Result<u64, NetlinkError> {
        let messages = self.handle.link().get().match_index(link.index).execute();
        let found: Vec<_> = messages.try_collect().await.map_err(failed("read the counters of a link"))?;
        let dropped =
            found.iter().flat_map(|message| &message.attributes).find_map(|attribute| match attribute {
                LinkAttribute::Stats64(stats) => Some(stats.tx_dropped),
                _ => None,
            });
        Ok(dropped.unwrap_or(0))
    }

    /// The link to which the main table routes one host address, by [`Netlink::route_host`].
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn host_route(&self, address: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let to = RouteAddress::from(address);
        let is_it = |route: &RouteMessage| {
            route.header.destination_prefix_length == width(address)
                && route.attributes.contains(&RouteAttribute::Destination(to.clone()))
        };
        let routes = self.our_routes(address.is_ipv4()).await?;
        Ok(routes.iter().find(|route| is_it(route)).and_then(link_of))
    }

    /// Whether the main table has a route for exactly one host address that is somebody else's.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn has_foreign_host_route(&self, address: IpAddr) -> Result<bool, NetlinkError> {
        let to = RouteAttribute::Destination(RouteAddress::from(address));
        let routes = self.main_routes(address.is_ipv4()).await?;
        let mut foreign = routes.iter().filter(|route| !is_ours(route));
        Ok(foreign.any(|route| {
            route.header.destination_prefix_length == width(address) && route.attributes.contains(&to)
        }))
    }

    /// Whether the main table's default route of one family, made by [`Netlink::default_route`], leaves by a link and
    /// gives unbound sockets this source.
    ///
    /// # Errors
    /// [`NetlinkError::Request`].
    pub async fn has_default_route(&self, link: &Link, source: IpAddr) -> Result<bool, NetlinkError> {
        let source = RouteAttribute::PrefSource(RouteAddress::from(source));
        let v4 = matches!(source, RouteAttribute::PrefSource(RouteAddress::Inet(_)));
        let routes = self.our_routes(v4).await?;
        let mut defaults = routes.iter().filter(|route| route.header.destination_prefix_length == 0);
        // A second one could be chosen instead.
        let first = defaults.next().filter(|_| defaults.next().is_none());
        Ok(first.is_some_and(|r| link_of(r) == Some(link.index) && r.attributes.contains(&source)))
    }

    /// The routes of one family in the main table that are ours.
    async fn our_routes(&self, v4: bool) -> Result<Vec<RouteMessage>, NetlinkError> {
        Ok(self.main_routes(v4).await?.into_iter().filter(is_ours).collect())
    }

    /// The routes of one family in the main table.
    async fn main_routes(&self, v4: bool) -> Result<Vec<RouteMessage>, NetlinkError> {
        let unspecified = if v4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(unspecified, 0)
            .map_err(|_prefix_too_long| NetlinkError::NoLink(unspecified.to_string()))?
            .build();
        // With a destination the kernel would look up one route instead of listing them all.
        message.attributes.clear();
        let messages = self.handle.route().get(message).execute();
        let found: Vec<_> = messages.try_collect().await.map_err(failed("list routes"))?;
        Ok(found.into_iter().filter(|route| u32::from(route.header.table) == MAIN_TABLE).collect())
    }
}

fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
}

fn link_of(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}
