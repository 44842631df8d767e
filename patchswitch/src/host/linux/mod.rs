//! Linux, one named place for each part of it.

pub mod block;
pub mod cutter;
mod cutter_child;
pub mod dm;
mod dm_ioctl;
mod ioctl;
pub mod loopdev;
pub mod programs;
