//! `compile --tune` of a small model: every problem is measured, and the plan made with the lock file runs.

use std::path::Path;
use std::process::Command;

use lfm2c::codegen::Lock;
use lfm2c::codegen::lock::Time;
use lfm2c::codegen::select::APART;
use libtest_mimic::{Failed, Trial};

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("tune demo", tune)]
}

fn lfm2c(folder: &Path, arguments: &[&str]) -> Result<String, Failed> {
    let output = Command::new(env!("CARGO_BIN_EXE_lfm2c")).current_dir(folder).args(arguments).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(String::from_utf8(output.stdout)?)
    } else {
        Err(format!("{arguments:?}: {errors}").into())
    }
}

fn tune() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let at = folder.path();
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("plans/synthetic.ron"), at.join("demo.ron"))?;
    let compile =
        ["compile", "demo.ron", "--target", "sm_90a", "--dtype", "bf16", "--prefill", "64", "-o", "demo.plan"];
    let first = lfm2c(at, &[&compile[..], &["--decode", "1", "--tune"]].concat())?;
    let lock = Lock::read(&at.join("demo.lock.ron")).map_err(|e| format!("{e:#}"))?.ok_or("no lock file")?;
    for (key, measured) in &lock.problems {
        assert!(measured.chosen == APART || measured.candidates.contains_key(&measured.chosen), "{key}: {measured:?}");
        for (name, time) in &measured.candidates {
            assert!(matches!(time, Time::Us(us) if *us > 0.0), "{key}, {name}: {time:?}");
        }
    }
    assert!(first.contains("chooses the kernels of") && !first.contains("does not know"), "{first}");
    // Another size comes on top.
    lfm2c(at, &[&compile[..], &["--decode", "8", "--tune"]].concat())?;
    let second = lfm2c(at, &[&compile[..], &["--decode", "1,8"]].concat())?;
    assert!(second.contains("chooses the kernels of") && !second.contains("does not know"), "{second}");
    let run = |more: &[&str]| lfm2c(at, &[&["run", "demo.plan", "--max-new-tokens", "8"], more].concat());
    assert!(!run(&["--device", "cuda", "--require-graphs"])?.trim().is_empty());
    Ok(())
}
