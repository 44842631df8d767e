//! Requests.
pub(crate) const RR: u16 = 83;
