//! Linux, one named place for each part of it.

pub mod netlink;
pub mod netns;
pub mod programs;
pub mod root;
pub mod sockets;
pub mod sysctl;
