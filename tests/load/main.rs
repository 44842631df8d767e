//! The framework's own tests, and the load client's in network namespaces: a measuring device is checked first.
#![expect(clippy::unwrap_used, reason = "what a test's own helpers cannot do ends the test")]

mod client;
mod leftovers;
mod netlab;
mod observe;
