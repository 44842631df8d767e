//! The command line. Everything it does, the library can do.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::run()
}
