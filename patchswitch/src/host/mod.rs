//! The seam to the kernel. Nothing here knows what a switchover is.

pub mod linux;
