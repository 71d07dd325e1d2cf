//! What cannot be done, and files that are not what they should be: an exit code and a reason.

use crate::command::{done, lfm2c, project};
use crate::{fails, folder_with_plan, json};

#[test]
fn what_cannot_run_says_why() {
    let folder = folder_with_plan();
    let at = folder.path();
    let long: Vec<String> = (0..520).map(|_| "1".to_owned()).collect();
    let cases: [(&[&str], &str); 9] = [
        (&["run", "missing.plan"], "missing.plan"),
        (&["run", "demo.plan", "--tokens", "512"], "vocabulary"),
        (&["run", "demo.plan", "--tokens", &long.join(",")], "max-context"),
        (&["run", "demo.plan", "--device", "cuda"], "--device cpu"),
        (&["bench", "demo.plan", "--decode", "1"], "--target sm_90a"),
        (&["profile", "demo.plan"], "--target sm_90a"),
        (&["profile", "missing.plan"], "missing.plan"),
        (&["run", "demo.plan", "--require-graphs"], "graphs"),
        (&["compile", "--model", "nowhere", "-o", "x.plan"], "nowhere"),
    ];
    for (arguments, expected) in cases {
        let errors = fails(at, 1, arguments);
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
    }
}

/// `-o` may name a device: renaming a file onto it would take it from the whole machine.
#[test]
#[cfg(unix)]
fn a_plan_goes_through_links_and_pipes() {
    let folder = folder_with_plan();
    let at = folder.path();
    let demo = project("plans/synthetic.ron");
    let compile = |name| done(at, &["compile", demo.to_str().expect("UTF-8"), "-o", name]);
    std::fs::write(at.join("target.plan"), b"old").expect("it is written");
    std::os::unix::fs::symlink("target.plan", at.join("link.plan")).expect("it is linked");
    compile("link.plan");
    let is_link = std::fs::symlink_metadata(at.join("link.plan")).expect("it is there").is_symlink();
    let plan = std::fs::read(at.join("target.plan")).expect("it is there");
    assert!(is_link && plan.starts_with(b"LFM2PLAN"));
    assert!(std::process::Command::new("mkfifo").arg(at.join("pipe")).status().expect("mkfifo runs").success());
    let pipe = at.join("pipe");
    let reader = std::thread::spawn(move || std::fs::read(pipe).expect("it can be read"));
    compile("pipe");
    assert!(reader.join().expect("the reader ends") == plan);
    let pipe = std::fs::symlink_metadata(at.join("pipe")).expect("it is there").file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_fifo(&pipe));
}

/// Nobody reads, or nothing can be written: an exit code, no panic.
#[test]
fn lost_output_is_no_panic() {
    let folder = folder_with_plan();
    for arguments in [&["inspect", "demo.plan", "--manifest"][..], &["run", "demo.plan"], &["dot", "demo.plan"]] {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_lfm2c"))
            .args(arguments)
            .current_dir(folder.path())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("it starts");
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().expect("it ends").code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn a_changed_model_directory_is_refused() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let source = project("tests/goldens/moe-no-dense");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.path().join(name)).expect("it can be copied");
    }
    done(folder.path(), &["compile", "--model", ".", "--prefill", "16", "--decode", "1", "-o", "x.plan"]);
    done(folder.path(), &["run", "x.plan", "--tokens", "1"]);
    let config = std::fs::read_to_string(source.join("config.json")).expect("it is there");
    let other = config.replace("1000000.0", "10000.0");
    assert_ne!(config, other);
    std::fs::write(folder.path().join("config.json"), other).expect("it is written");
    assert!(fails(folder.path(), 1, &["run", "x.plan", "--tokens", "1"]).contains("another model"));
}

#[test]
fn damaged_and_foreign_plans_are_refused() {
    let folder = folder_with_plan();
    let at = folder.path();
    let plan = std::fs::read(at.join("demo.plan")).expect("the plan was written");
    let write = |name: &str, bytes: &[u8]| std::fs::write(at.join(name), bytes).expect("it is written");
    write("short.plan", &plan[..plan.len() / 2]);
    let mut flipped = plan.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    write("flipped.plan", &flipped);
    let mut version = plan.clone();
    version[8] = version[8].wrapping_add(1);
    write("version.plan", &version);
    write("other.plan", b"not a plan at all");
    write("empty.plan", b"");
    let mut seen = vec![];
    for name in ["short.plan", "flipped.plan", "version.plan", "other.plan", "empty.plan"] {
        let errors = fails(at, 1, &["run", name]);
        assert!(errors.contains("expected") && errors.contains("found"), "{name}: {errors}");
        seen.push(errors.replace(name, ""));
    }
    assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[2] != seen[3], "{seen:?}");
    let other = project("tests/goldens/moe-base");
    let errors = fails(at, 1, &["run", "demo.plan", "--model", other.to_str().expect("UTF-8")]);
    assert!(errors.contains("another model"), "{errors}");
}

#[test]
fn verify_holds_and_fails() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let model = project("tests/goldens/moe-no-dense");
    let (model, golden) = (model.to_str().expect("UTF-8"), model.join("golden.safetensors"));
    let golden = golden.to_str().expect("UTF-8");
    let compile = ["compile", "--model", model, "--max-context", "256", "--prefill", "64", "--decode", "1"];
    done(folder.path(), &[&compile[..], &["--dtype", "f32", "-o", "f32.plan"]].concat());
    let verify = |plan| ["verify", plan, "--model", model, "--golden", golden];
    assert!(done(folder.path(), &verify("f32.plan")).contains("9 of 9 prompts hold"));
    done(folder.path(), &[&compile[..], &["--dtype", "bf16", "-o", "bf16.plan"]].concat());
    let errors = fails(folder.path(), 1, &[&verify("bf16.plan")[..], &["--tolerance", "1e-5"]].concat());
    assert!(errors.contains("tolerance"), "{errors}");
}

#[test]
fn checkpoint_faults_are_told_all_at_once() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let source = project("tests/goldens/moe-no-dense");
    let copy = folder.path().join("model");
    std::fs::create_dir(&copy).expect("it can be made");
    for entry in std::fs::read_dir(&source).expect("it can be listed") {
        let entry = entry.expect("it can be listed");
        std::fs::copy(entry.path(), copy.join(entry.file_name())).expect("it can be copied");
    }
    let path = copy.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("the checkpoint is there");
    // Same length, other names: two tensors are then missing and two unexpected.
    let text = replace(&bytes, b"model.embedding_norm.weight", b"model.embedding_norX.weight");
    let text = replace(&text, b"layers.0.operator_norm.weight", b"layers.0.operator_norX.weight");
    std::fs::write(&path, text).expect("it is written");
    let errors = fails(folder.path(), 1, &["run", "model.plan", "--model", "model"]);
    assert!(errors.contains("model.plan"), "{errors}");
    done(
        folder.path(),
        &[
            "compile",
            "--model",
            source.to_str().expect("UTF-8"),
            "--prefill",
            "16",
            "--decode",
            "1",
            "-o",
            "model.plan",
        ],
    );
    let errors = fails(folder.path(), 1, &["run", "model.plan", "--model", "model", "--tokens", "1"]);
    let early = fails(folder.path(), 1, &["compile", "--model", "model", "-o", "early.plan"]);
    assert!(early.contains("2 missing, 2 unexpected"), "{early}");
    for name in ["model.embedding_norm.weight", "operator_norm.weight", "embedding_norX", "operator_norX"] {
        assert!(errors.contains(name), "{name} is not in: {errors}");
    }
}

/// Replaces a byte string by one of the same length.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).expect("the name is in the file");
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

#[test]
fn weights_that_do_not_pack_are_read_as_they_are() {
    const NAME: &str = "model.layers.0.conv.out_proj.weight";
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = |name: &str| folder.path().join(name);
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(project("models/demo").join(name), at(name)).expect("it can be copied");
    }
    let compile = |plan: &str| {
        let arguments =
            ["compile", "--model", ".", "--target", "sm_90a", "--without-cubins", "--pack", "--dtype", "bf16"];
        let sizes = ["--decode", "1", "--prefill", "16", "--max-context", "256", "-o", plan];
        let output = lfm2c(folder.path(), &[&arguments[..], &sizes].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        let file =
            lfm2c::plan::PlanFile::from_bytes(&std::fs::read(at(plan)).expect("it was written")).expect("a plan");
        let program = &file.manifest.ranks[0];
        let names: Vec<String> =
            program.packed.iter().map(|form| program.weights[form.weight as usize].name.clone()).collect();
        (errors, names)
    };
    let (errors, all) = compile("all.plan");
    assert!(!errors.contains("do not pack") && all.len() > 3, "{errors}{all:?}");

    // A row of numbers from 128 different binades.
    let mut bytes = std::fs::read(at("model.safetensors")).expect("it is there");
    let data = 8 + u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
    let header = json(std::str::from_utf8(&bytes[8..data]).expect("JSON"));
    let begin = data + header[NAME]["data_offsets"][0].as_u64().expect("an offset") as usize;
    for (i, number) in bytes[begin..][..256].as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *number = ((i as u16 + 40) << 7).to_le_bytes();
    }
    std::fs::write(at("model.safetensors"), bytes).expect("it can be written");
    let (errors, some) = compile("some.plan");
    assert!(errors.contains("1 of 128 rows do not pack, so it is read as it is"), "{errors}");
    let left: Vec<&String> = all.iter().filter(|name| !some.contains(name)).collect();
    assert!(left.len() == 1 && errors.contains(left[0].as_str()) && some.len() + 1 == all.len(), "{left:?} {errors}");
    let run = ["--model", ".", "--device", "cpu", "--tokens", "5,6", "--max-new-tokens", "2"];
    let of = |plan| done(folder.path(), &[&["run", plan][..], &run].concat());
    assert_eq!(of("some.plan"), of("all.plan"));
}

#[test]
fn results_are_not_written_over_what_is_read() {
    let folder = folder_with_plan();
    let at = folder.path();
    std::fs::copy(project("plans/synthetic.ron"), at.join("my.ron")).expect("it can be copied");
    std::fs::write(at.join("in.jsonl"), "{\"tokens\": [5, 17]}\n").expect("it can be written");
    std::fs::write(at.join("counts.json"), "{}").expect("it can be written");
    let spread = ["compile", "my.ron", "--ranks", "expert=2", "--expert-counts", "counts.json", "-o", "counts.json"];
    let kept = ["my.ron", "in.jsonl", "counts.json", "demo.plan"];
    let before = kept.map(|name| std::fs::read(at.join(name)).expect("it is there"));
    for (arguments, option) in [
        (&["compile", "my.ron", "-o", "my.ron"][..], "--output my.ron"),
        (&spread, "--output counts.json"),
        (&["run", "demo.plan", "--tokens", "1", "--logits", "./demo.plan"], "--logits ./demo.plan"),
        (&["run", "demo.plan", "--input", "in.jsonl", "--output", "in.jsonl"], "--output in.jsonl"),
        (&["run", "demo.plan", "--input", "in.jsonl", "--count-experts", "in.jsonl"], "--count-experts in.jsonl"),
        (&["run", "demo.plan", "--tokens", "1", "--logits", "x", "--prompt-logits", "./x"], "--prompt-logits ./x"),
        (&["inspect", "demo.plan", "--memory", "demo.plan"], "--memory demo.plan"),
        (&["dot", "demo.plan", "-o", "demo.plan"], "--output demo.plan"),
        (&["samples", "demo.plan", "--count", "1", "--length", "2", "-o", "demo.plan"], "--output demo.plan"),
    ] {
        let errors = fails(at, 2, arguments);
        assert!(errors.contains(&format!("{option}: expected another file than ")), "{arguments:?}: {errors}");
    }
    assert_eq!(kept.map(|name| std::fs::read(at.join(name)).expect("it is there")), before);
    assert!(!at.join("x").exists());
}

#[test]
fn what_goes_with_an_input_is_refused_without() {
    let folder = folder_with_plan();
    let options = [["-n", "3"], ["--output", "r.jsonl"], ["--validate", "r.bin"], ["--compare", "demo.plan"]];
    for option in options {
        let errors = fails(folder.path(), 2, &[&["run", "demo.plan", "--tokens", "1"], &option[..]].concat());
        assert!(errors.contains(&format!("{}: expected --input FILE", option[0])), "{errors}");
    }
    assert!(!folder.path().join("r.jsonl").exists());
}
