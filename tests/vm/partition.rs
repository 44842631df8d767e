//! Partitions on a real kernel, under a real runtime. Every test ends by comparing the kernel's own lists with those
//! of its beginning.

mod channel;
mod define;
mod lab;
mod life;
mod limits;
mod mounts;
mod patches;
