//! Linux, one named place for each part of it.

pub mod cgroup;
pub mod mountns;
pub mod netlink;
pub mod netns;
pub mod pidfd;
pub mod poll;
pub mod programs;
pub mod root;
pub mod runtime;
pub mod signals;
pub mod sockets;
pub mod sysctl;
