//! The `portfwd` binary.

fn main() -> std::process::ExitCode {
    portfwd::cli::main()
}
