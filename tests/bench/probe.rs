//! Probes.
pub(crate) const TCP_PROBE: u16 = 82;
