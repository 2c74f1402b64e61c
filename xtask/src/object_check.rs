//! No panic may survive in the kernel object.
//!
//! The panic handler is an endless loop: the verifier refuses it, but in its own words, far from the
//! cause. An index or a subtraction that the optimiser could not prove right is found here instead.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind};

const INSTRUCTION_SIZE: usize = 8;
/// `goto`, with its signed distance in bytes 2 and 3, counted from the next instruction.
const GOTO: u8 = 0x05;
/// Loads 64 bits and takes two slots; the second is not an instruction.
const LOAD_64: u8 = 0x18;

/// Fails when the object at `path` contains the panic machinery, or an endless loop, which is what
/// remains of the panic handler where it was inlined.
pub fn refuse_panics(path: &Path) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let object = object::File::parse(&*bytes)
        .with_context(|| format!("{} is not an ELF object", path.display()))?;

    let panics: BTreeSet<_> = object
        .symbols()
        .filter_map(|symbol| symbol.name().ok())
        .filter(|name| name.contains("panic") || name.contains("rust_begin_unwind"))
        .collect();
    if !panics.is_empty() {
        let panics = panics.into_iter().collect::<Vec<_>>().join(", ");
        bail!(
            "{} can panic ({panics}); `llvm-objdump -dlr` on it shows the line",
            path.display()
        );
    }
    for section in object.sections() {
        if section.kind() != SectionKind::Text {
            continue;
        }
        let name = section.name().unwrap_or("?");
        let code = section
            .data()
            .with_context(|| format!("section {name} of {} is damaged", path.display()))?;
        if let Some(offset) = endless_loop(code) {
            bail!(
                "{} can panic (an endless loop at {offset:#x} of section {name}); `llvm-objdump -dlr` on it shows the line",
                path.display()
            );
        }
    }
    Ok(())
}

/// The offset in bytes of the first instruction that jumps to itself.
fn endless_loop(code: &[u8]) -> Option<usize> {
    let mut second_half = false;
    for (index, instruction) in code.chunks_exact(INSTRUCTION_SIZE).enumerate() {
        if second_half {
            second_half = false;
            continue;
        }
        let distance = i16::from_le_bytes([instruction[2], instruction[3]]);
        if instruction[0] == GOTO && distance == -1 {
            return Some(index * INSTRUCTION_SIZE);
        }
        second_half = instruction[0] == LOAD_64;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::endless_loop;

    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    const JUMP_TO_ITSELF: [u8; 8] = [0x05, 0, 0xff, 0xff, 0, 0, 0, 0];
    const JUMP_BACK: [u8; 8] = [0x05, 0, 0xfe, 0xff, 0, 0, 0, 0];
    const LOAD_64: [u8; 8] = [0x18, 1, 0, 0, 0, 0, 0, 0];

    #[test]
    fn a_jump_to_itself_is_found() {
        assert_eq!(endless_loop(&[EXIT, JUMP_TO_ITSELF].concat()), Some(8));
    }

    #[test]
    fn a_loop_with_a_body_is_no_endless_loop() {
        assert_eq!(endless_loop(&[EXIT, JUMP_BACK, EXIT].concat()), None);
    }

    #[test]
    fn the_second_slot_of_a_wide_load_is_data() {
        assert_eq!(
            endless_loop(&[LOAD_64, JUMP_TO_ITSELF, EXIT].concat()),
            None
        );
    }
}
