//! Linux, one named place for each part of it.

pub mod block;
pub mod cgroup;
pub mod clock;
pub mod counters;
pub mod cutter;
mod cutter_child;
pub mod dm;
mod dm_ioctl;
pub mod ethtool;
pub mod frames;
pub mod hold_guard;
mod ioctl;
pub mod loopdev;
pub mod mountns;
pub mod neighbours;
pub mod netlink;
pub mod netns;
pub mod pidfd;
pub mod poll;
pub mod priority;
pub mod programs;
pub mod root;
pub mod runtime;
pub mod signals;
pub mod sockets;
pub mod sysctl;
pub mod tap;
