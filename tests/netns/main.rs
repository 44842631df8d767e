//! The switch between two real network namespaces, with real sockets. Needs root and a kernel to play with.

mod ask;
mod drain;
mod flows;
mod hand;
mod icmp;
mod inputs;
mod kill;
mod load;
mod local;
mod quarantine;
mod rig;
mod shared;
mod udp;
