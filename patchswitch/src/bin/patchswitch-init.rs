//! The program that runs inside a partition: see `patchswitch::init`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(patchswitch::init::main(std::env::args().skip(1)))
}
