//! patchswitch: patch a running service without anybody noticing.

pub mod config;
pub mod exit;
pub mod host;
pub mod names;
pub mod patch;
pub mod store;
pub mod verify;
