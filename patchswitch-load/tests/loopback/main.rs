//! The client against good and bad servers on the loopback, in both families. Needs no privileges.
#![expect(clippy::unwrap_used, reason = "what a test's own servers cannot do ends the test")]

mod failing;
mod good;
mod servers;
