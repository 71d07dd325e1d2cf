//! The evaluation form: samples, answers, times.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{done, fails, folder_with_plan, lfm2c, objects, project, read, write};

/// Samples and answers of what `transformers` computed: the first tokens of each golden prompt, and the logits behind them.
fn golden_samples(folder: &Path, golden: &str, length: usize) -> usize {
    let bytes = fs::read(project(golden)).expect("the golden file is there");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
    let (mut inputs, mut answers, mut count) = (vec![], vec![], 0i32);
    for number in 0.. {
        let Ok(ids) = tensors.tensor(&format!("ids.{number}")) else { break };
        if ids.shape()[0] < length {
            continue;
        }
        let logits = tensors.tensor(&format!("logits.{number}")).expect("logits");
        let row = logits.shape()[1] * 4;
        inputs.extend_from_slice(&ids.data()[..length * 4]);
        answers.extend_from_slice(&logits.data()[(length - 1) * row..length * row]);
        count += 1;
    }
    write(folder, "inputs.bin", [&count.to_le_bytes()[..], &(length as i32).to_le_bytes(), &inputs].concat());
    write(folder, "answers.bin", answers);
    count as usize
}

const VALIDATE: [&str; 8] =
    ["run", "f32.plan", "--device", "cpu", "--input", "inputs.bin", "--validate", "answers.bin"];

#[test]
fn samples_are_valid_up_to_the_tolerance() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    let model = project("tests/goldens/moe-no-dense");
    let compile = |dtype, plan| {
        let compile = [
            "compile",
            "--model",
            &model,
            "--target",
            "cpu",
            "--max-context",
            "64",
            "--prefill",
            "32",
            "--decode",
            "1",
        ];
        done(at, &[&compile[..], &["--dtype", dtype, "-o", plan]].concat());
    };
    compile("f32", "f32.plan");
    compile("f16", "f16.plan");
    let count = golden_samples(at, "tests/goldens/moe-no-dense/golden.safetensors", 8);
    assert!(count >= 3);
    let text = done(at, &[&VALIDATE[..], &["--tolerance", "1e-4"]].concat());
    assert!(
        text.contains(&format!("{count} samples of 8 tokens")) && text.contains("VALID: largest difference"),
        "{text}"
    );
    assert!(text.contains("tokens/s") && !text.contains("INVALID"), "{text}");
    // f16 against the same answers, and how the times compare.
    let both = [&VALIDATE[..], &["--compare", "f16.plan", "--tolerance", "0.5", "--format", "json"]].concat();
    let report = &objects(&done(at, &both))[0];
    assert_eq!((&report["samples"], &report["length"]), (&json!(count), &json!(8)));
    let [single, half] = &report["plans"].as_array().expect("plans")[..] else { panic!("two plans") };
    let largest = |plan: &Value| plan["largest_difference"].as_f64().expect("a number");
    assert!(largest(single) < 1e-4 && largest(half) > largest(single), "{report}");
    assert_eq!((&single["dtype"], &half["dtype"]), (&json!("f32"), &json!("f16")));
    assert!(report["times_as_fast"].as_f64().is_some_and(|times| times > 0.0));
    let strict = [&VALIDATE[..], &["--compare", "f16.plan", "--tolerance", "1e-4"]].concat();
    assert!(fails(at, 1, &strict).contains("f16.plan"));
    done(at, &["compile", &project("plans/synthetic.ron"), "--target", "cpu", "-o", "other.plan"]);
    let other = fails(at, 1, &[&VALIDATE[..], &["--compare", "other.plan"]].concat());
    assert!(other.contains("expected a plan of the same model"), "{other}");
    // One logit of sample 2 is wrong.
    let mut answers = read(at, "answers.bin");
    let row = answers.len() / count;
    let wrong = 2 * row + 5 * 4;
    let right = f32::from_le_bytes(answers[wrong..wrong + 4].try_into().expect("four bytes"));
    answers[wrong..wrong + 4].copy_from_slice(&(right + 0.01).to_le_bytes());
    write(at, "answers.bin", &answers);
    let output = lfm2c(at, &VALIDATE);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1));
    let expected =
        format!("INVALID: 1 of {count} samples beyond the tolerance 1e-3; the first is sample 2, at token 5: expected");
    assert!(text.contains(&expected), "{text}");
    done(at, &[&VALIDATE[..], &["-n", "2"]].concat());
    done(at, &[&VALIDATE[..], &["--tolerance", "0.02"]].concat());
    // Truncated files, and files that are not of this model or these inputs.
    write(at, "answers.bin", &answers[..answers.len() - 1]);
    let errors = fails(at, 1, &VALIDATE);
    let sizes = [format!("expected {} bytes", answers.len()), format!("found {}", answers.len() - 1)];
    assert!(sizes.iter().all(|size| errors.contains(size)), "{errors}");
    write(at, "answers.bin", &answers);
    let inputs = read(at, "inputs.bin");
    for length in [0, 7, 8, inputs.len() - 1] {
        write(at, "inputs.bin", &inputs[..length]);
        assert!(fails(at, 1, &VALIDATE).contains(&format!("found {length}")));
    }
    write(at, "inputs.bin", [&inputs[..12], &96i32.to_le_bytes(), &inputs[16..]].concat());
    let errors = fails(at, 1, &VALIDATE);
    assert!(errors.contains("sample 0, token 1: expected an id from 0 to 95, found 96"), "{errors}");
}

#[test]
fn samples_are_made_and_answered() {
    let folder = folder_with_plan();
    let at = folder.path();
    let make = ["samples", "demo.plan", "--count", "37", "--length", "21", "--seed", "3"];
    done(at, &[&make[..], &["-o", "inputs.bin", "--answers", "answers.bin"]].concat());
    let inputs = read(at, "inputs.bin");
    let words: Vec<i32> = inputs.as_chunks::<4>().0.iter().map(|&word| i32::from_le_bytes(word)).collect();
    assert_eq!((words[0], words[1], words.len()), (37, 21, 2 + 37 * 21));
    assert!(words[2..].iter().all(|token| (0..512).contains(token)));
    assert!(words[2..].iter().any(|&token| token < 64) && words[2..].iter().any(|&token| token >= 448));
    assert_eq!(read(at, "answers.bin").len(), 37 * 512 * 4);
    done(at, &[&make[..], &["-o", "again.bin"]].concat());
    assert!(inputs == read(at, "again.bin"));
    // The last row of a prompt's logits, and what a run with chunks and -n writes, are the answers.
    let tokens: Vec<String> = words[2..23].iter().map(ToString::to_string).collect();
    done(at, &["run", "demo.plan", "--tokens", &tokens.join(","), "--max-new-tokens", "0", "--prompt-logits", "p.npy"]);
    let table = npyz::NpyFile::new(&read(at, "p.npy")[..]).expect("it is NPY").into_vec::<f32>().expect("float32");
    let last: Vec<u8> = table[20 * 512..].iter().flat_map(|logit| logit.to_le_bytes()).collect();
    assert!(read(at, "answers.bin")[..2048] == last);
    let run = ["run", "demo.plan", "--input", "inputs.bin", "--output", "part.bin", "-n", "30", "--chunk", "5"];
    let text = done(at, &run);
    assert!(text.starts_with("30 samples of 21 tokens\n") && !text.contains("VALID"), "{text}");
    assert!(read(at, "part.bin") == read(at, "answers.bin")[..30 * 2048]);
    done(at, &["run", "demo.plan", "--input", "inputs.bin", "--validate", "answers.bin", "--tolerance", "0"]);
    let errors = fails(at, 1, &["samples", "demo.plan", "--length", "512", "-o", "x.bin", "--answers", "y.bin"]);
    assert!(errors.contains("sample 0") && errors.contains("max-context = 512"), "{errors}");
}
