//! patchswitch: patch a running service without anybody noticing.

pub mod attachment;
pub mod dataplane;
pub mod host;
pub mod names;
