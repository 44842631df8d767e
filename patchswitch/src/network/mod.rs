//! What is said on a wire, as bytes: nothing here touches the kernel.

pub mod announce;
pub mod claim;
pub mod repeat;
