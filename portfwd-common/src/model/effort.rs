//! How long tests that draw their cases at random go on.

/// The variable that multiplies what random tests draw: `PORTFWD_EFFORT=1000 cargo test --release -p portfwd-common`.
pub const VARIABLE: &str = "PORTFWD_EFFORT";

/// How many cases to draw where `usual` are enough for every day.
///
/// # Panics
///
/// If the variable is no number: a long run that is none must not go unnoticed.
#[must_use]
pub fn cases(usual: u32) -> u32 {
    match std::env::var(VARIABLE) {
        Ok(times) => usual.saturating_mul(
            times
                .parse()
                .unwrap_or_else(|_| panic!("{VARIABLE}={times} is not a number")),
        ),
        Err(_) => usual,
    }
}
