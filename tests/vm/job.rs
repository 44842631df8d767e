//! Whole jobs, by the command line, as a user has them: two partitions with a small root, a service with a web server,
//! a client on a network of its own that asks all the time, and patches that are scripts.
//!
//! Who serves is asked through the service address; what is left behind is looked for in the kernel's own lists.

mod background;
mod bases;
mod beside;
mod client;
mod copies;
mod database;
mod decisions;
mod exchange;
mod failing;
mod faults;
mod good;
mod inputs;
mod keeper;
mod kills;
mod letter;
mod lost;
mod mend;
mod moments;
mod quiesce;
mod rollbacks;
mod soak;
mod stage;
mod systemd;
