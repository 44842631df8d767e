//! The framework's own tests, and the load client's in network namespaces: a measuring device is checked first.

mod netlab;
