//! `compile --tune` of a small model: every problem is measured, and the plan made with the lock file runs.

use std::path::Path;
use std::process::Command;

use lfm2c::codegen::Lock;
use lfm2c::codegen::lock::Time;
use lfm2c::codegen::select::APART;
use libtest_mimic::{Failed, Trial};

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("tune demo", tune), Trial::test("tune spread demo", spread)]
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

/// Of a plan whose experts are spread, the first rank's problems are measured by itself, and known where all ranks are compiled for.
fn spread() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let at = folder.path();
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("plans/synthetic.ron"), at.join("demo.ron"))?;
    let compile = ["compile", "demo.ron", "--target", "sm_90a", "--dtype", "bf16", "--prefill", "64", "--decode", "8"];
    let spread = [&compile[..], &["--ranks", "expert=2", "-o", "two.plan"]].concat();
    let first = lfm2c(at, &[&spread[..], &["--tune"]].concat())?;
    assert!(first.contains("whole graph of") && first.contains("decode_8"), "{first}");
    let again = lfm2c(at, &spread)?;
    assert!(again.contains("chooses the kernels of") && !again.contains("does not know"), "{again}");
    let lock = Lock::read(&at.join("demo.lock.ron")).map_err(|e| format!("{e:#}"))?.ok_or("no lock file")?;
    assert!(lock.problems.keys().any(|key| key.starts_with("local+group ")), "{lock:?}");
    assert!(!lock.problems.keys().any(|key| key.starts_with("all_")), "{lock:?}");
    let profile = lfm2c(at, &["profile", "two.plan", "--bucket", "decode_8"])?;
    assert!(profile.contains("all_gather") && profile.contains("blocksum"), "{profile}");
    let blocks = lfm2c(at, &["bench", "two.plan", "--block", "moe", "--decode", "8", "--steps", "5"])?;
    assert!(blocks.contains("all_to_all"), "{blocks}");
    Ok(())
}

/// Where the library is measured against the kernels that are chosen, every problem that it has a call for is, and what it chose runs.
pub fn libraries() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let at = folder.path();
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("plans/synthetic.ron"), at.join("demo.ron"))?;
    let compile = ["compile", "demo.ron", "--target", "sm_90a", "--dtype", "bf16", "--libraries", "cublaslt"];
    let sizes = ["--prefill", "64,512", "--decode", "1", "-o", "demo.plan"];
    let first = lfm2c(at, &[&compile[..], &sizes[..], &["--tune=libraries"]].concat())?;
    assert!(first.contains("prefill_64: ") && first.contains("prefill_512: "), "{first}");
    let lock = Lock::read(&at.join("demo.lock.ron")).map_err(|e| format!("{e:#}"))?.ok_or("no lock file")?;
    assert!(lock.problems.len() > 4, "{lock:?}");
    for (key, measured) in &lock.problems {
        let names: Vec<&str> = measured.candidates.keys().map(String::as_str).collect();
        assert!(
            names.len() == 2 && names.contains(&"cublaslt") && names.contains(&&*measured.chosen),
            "{key}: {names:?}"
        );
        assert!(
            measured.candidates.values().all(|time| matches!(time, Time::Us(us) if *us > 0.0)),
            "{key}: {measured:?}"
        );
    }
    // Whatever was faster, a plan by the library runs: with graphs, and as a measurement of all candidates finds it.
    let tuned =
        lfm2c(at, &[&compile[..], &["--prefill", "64", "--decode", "1", "-o", "demo.plan", "--tune"]].concat())?;
    assert!(tuned.contains("chooses the kernels of") && !tuned.contains("does not know"), "{tuned}");
    let mut lock = Lock::read(&at.join("demo.lock.ron")).map_err(|e| format!("{e:#}"))?.ok_or("no lock file")?;
    for measured in lock.problems.values_mut() {
        measured.library = measured.candidates.contains_key("cublaslt").then(|| "cublaslt".to_owned());
    }
    lock.write(&at.join("demo.lock.ron")).map_err(|e| format!("{e:#}"))?;
    lfm2c(at, &[&compile[..], &sizes[..]].concat())?;
    assert!(lfm2c(at, &["inspect", "demo.plan", "--bucket", "prefill_512"])?.contains("cublaslt"));
    lfm2c(at, &["inspect", "demo.plan", "--device"])?;
    let bench = ["bench", "demo.plan", "--block", "dense", "--prefill", "512", "--steps", "5"];
    assert!(lfm2c(at, &bench)?.contains("cublaslt"));
    assert!(lfm2c(at, &["profile", "demo.plan", "--bucket", "prefill_512"])?.contains("cublaslt"));
    lfm2c(at, &["diff", "demo.plan", "--bucket", "prefill_512"])?;
    let run = ["run", "demo.plan", "--max-new-tokens", "8", "--device", "cuda", "--require-graphs"];
    assert!(!lfm2c(at, &run)?.trim().is_empty());
    Ok(())
}
