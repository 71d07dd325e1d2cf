//! Sources as they are compiled: with a progress bar, and for the checkpoint that they name.

use anyhow::Result;

use crate::cli::output::note;
use crate::cli::progress;
use crate::codegen::compile::Observer;
use crate::codegen::{CompileOptions, Compiled, Source, compile};
use crate::ir::Graph;
use crate::plan::packed::MAX_EXCEPTIONS;
use crate::runtime::weights::{self, Checkpoint, Unpackable};

/// Compiles with a progress bar.
pub fn compile_source(source: &Source, options: &CompileOptions) -> Result<Compiled> {
    let bar = progress::count("compiling", 0);
    let compiled = compile(source, options, &Bar(&bar));
    bar.finish_and_clear();
    compiled
}

/// Compiles for the source's checkpoint, if it has one: refuses one that the plan could not be run with, and leaves weights as they are of
/// which it does not allow a packed form.
pub fn compile_for_checkpoint(
    source: &Source,
    options: &CompileOptions,
    compile: &dyn Fn(&CompileOptions) -> Result<Compiled>,
) -> Result<Compiled> {
    let compiled = compile(options)?;
    let Source::Recipe(recipe, Some(_)) = source else { return Ok(compiled) };
    let Some(directory) = recipe.directory() else { return Ok(compiled) };
    let checkpoint = Checkpoint::open(directory)?;
    weights::check(&compiled.file.manifest, &checkpoint)?;
    let unpackable = weights::unpackable(&compiled.file.manifest, &checkpoint)?;
    if unpackable.is_empty() {
        return Ok(compiled);
    }
    for Unpackable { weight, failed, rows } in &unpackable {
        note(format_args!(
            "weight {weight}: {failed} of {rows} rows do not pack, so it is read as it is: more than {MAX_EXCEPTIONS} of their numbers lie \
             outside of the 15 binades that hold most"
        ));
    }
    let names = unpackable.into_iter().map(|found| found.weight).collect();
    compile(&CompileOptions { unpacked: names, ..options.clone() })
}

struct Bar<'a>(&'a indicatif::ProgressBar);

impl Observer for Bar<'_> {
    fn pass(&self, _bucket: Option<&str>, _pass: &str, _graph: &Graph) {}

    fn progress(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }

    fn kernels(&self, done: usize, total: usize) {
        self.0.set_message("compiling kernels");
        self.progress(done, total);
    }
}
