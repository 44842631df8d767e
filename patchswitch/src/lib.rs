//! patchswitch: patch a running service without anybody noticing.

pub mod control;
pub mod exit;
pub mod host;
pub mod names;
pub mod partition;
pub mod patch;
