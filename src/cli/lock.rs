//! The lock file beside a recipe: where it is, and what a compilation takes of it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cli::output::note_once;
use crate::codegen::{CompileOptions, Compiled, Lock};
use crate::passes::Target;

/// Where the lock file of a recipe is, or of a plan whose model has no recipe: `demo.lock.ron` beside `demo.ron`.
pub fn beside(path: &Path) -> PathBuf {
    path.with_extension("lock.ron")
}

/// Options with the choices of the lock file beside a path, if there is one and they are for a GPU, and for problems that it does
/// not know with those that the program brings.
pub fn apply(mut options: CompileOptions, path: &Path) -> Result<CompileOptions> {
    if options.target == Target::Cpu {
        return Ok(options);
    }
    options.tactics = Lock::shipped()?.tactics();
    let path = beside(path);
    let Some(lock) = Lock::read(&path)? else { return Ok(options) };
    if lock.compiler != env!("CARGO_PKG_VERSION") {
        note_once(format_args!(
            "{}: measured by lfm2c {}, this is {}; measure again with `lfm2c compile --tune`",
            path.display(),
            lock.compiler,
            env!("CARGO_PKG_VERSION")
        ));
    }
    options.tactics.overlay(lock.tactics());
    Ok(options)
}

/// How many choices a plan of what lies at a path has by measurement, in a line; nothing if none.
pub fn report(path: &Path, compiled: &Compiled) -> Option<String> {
    let known = compiled.known;
    let unknown = known.problems - known.chosen;
    let rest = match unknown {
        0 => String::new(),
        _ => format!("; {unknown} that it does not know take the default"),
    };
    let path = beside(path);
    let source = match path.exists() {
        true => path.display().to_string(),
        false if known.chosen > 0 => "measured before, on an H200".to_owned(),
        false => return None,
    };
    Some(format!("{source}: chooses the kernels of {} of {} problems{rest}", known.chosen, known.problems))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_the_name_of_what_it_is_beside() {
        for (path, lock) in [
            ("plans/demo.ron", "plans/demo.lock.ron"),
            ("lfm2.5-8b.ron", "lfm2.5-8b.lock.ron"),
            ("out/x.plan", "out/x.lock.ron"),
            ("gelu.ir", "gelu.lock.ron"),
            ("x", "x.lock.ron"),
        ] {
            assert_eq!(beside(Path::new(path)), Path::new(lock));
        }
    }
}
