//! patchswitch: patch a running service without anybody noticing.

pub mod attachment;
pub mod config;
pub mod control;
pub mod dataplane;
pub mod exit;
pub mod host;
pub mod init;
pub mod manager;
pub mod names;
pub mod partition;
pub mod patch;
pub mod storage;
pub mod store;
pub mod switchover;
pub mod verify;
