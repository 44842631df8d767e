//! The switch between two real network namespaces, with real sockets. Needs root and a kernel to play with.

#[cfg(test)]
mod alike;
#[cfg(test)]
mod announce;
#[cfg(test)]
mod ask;
#[cfg(test)]
mod beside;
#[cfg(test)]
mod buffers;
#[cfg(test)]
mod bulk;
#[cfg(test)]
mod canary;
#[cfg(test)]
mod claims;
#[cfg(test)]
mod counters;
#[cfg(test)]
mod drain;
#[cfg(test)]
mod errors;
#[cfg(test)]
mod examples;
#[cfg(test)]
mod exchange;
#[cfg(test)]
mod flood;
#[cfg(test)]
mod flows;
#[cfg(test)]
mod foreign;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod gone;
#[cfg(test)]
mod group;
#[cfg(test)]
mod hand;
mod hold;
#[cfg(test)]
mod hosts;
#[cfg(test)]
mod icmp;
#[cfg(test)]
mod inputs;
#[cfg(test)]
mod kill;
#[cfg(test)]
mod letter;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod load;
#[cfg(test)]
mod local;
#[cfg(test)]
mod neighbours;
#[cfg(test)]
mod offload;
#[cfg(test)]
mod postgres;
#[cfg(test)]
mod quarantine;
#[cfg(test)]
mod quic;
#[cfg(test)]
mod reassert;
#[cfg(test)]
mod redis;
#[cfg(test)]
mod reload;
#[cfg(test)]
mod repairs;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod shared;
#[cfg(test)]
mod silent;
#[cfg(test)]
mod synflood;
#[cfg(test)]
mod syns;
#[cfg(test)]
mod tap;
#[cfg(test)]
mod udp;
#[cfg(test)]
mod uplinks;
#[cfg(test)]
mod verified;
#[cfg(test)]
mod xdp;
