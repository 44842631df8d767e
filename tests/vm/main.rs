//! Tests that need device-mapper, cgroup v2 and an OCI runtime: run as root inside the disposable test machine, on
//! each of the stock Debian kernels in `tests/KERNELS`.

#[cfg(test)]
mod job;
#[cfg(test)]
mod pacing;
#[cfg(test)]
mod partition;
mod smoke;
#[cfg(test)]
mod storage;
#[cfg(test)]
mod vlan;
