//! Plans with steps that are calls of a library, as far as they can be checked without one: who gets them, what the validator and the
//! commands say of them, and that they mean what kernels do.

#[path = "common/command.rs"]
mod command;

use std::collections::BTreeMap;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::lock::{LOCK_VERSION, Measured};
use lfm2c::codegen::select::{Libraries, Tactics};
use lfm2c::codegen::{CompileOptions, Lock, Recipe, Source, Tuning, compile};
use lfm2c::ir::DType;
use lfm2c::passes::{self, Target};
use lfm2c::plan::{self, LibraryCall, LibraryMatmul, Manifest, Phase, PlanError, PlanFile, StateRole, Step};

use command::{done, lfm2c, project};

fn options(libraries: Libraries) -> CompileOptions {
    CompileOptions {
        target: Target::Sm90a,
        dtype: Some(DType::BF16),
        without_cubins: true,
        prefill: Some(vec![16, 300]),
        decode: Some(vec![1, 16]),
        libraries,
        ..CompileOptions::default()
    }
}

fn plan_with(options: &CompileOptions) -> PlanFile {
    let recipe = Recipe::parse(include_str!("../plans/synthetic.ron")).expect("the recipe is valid");
    compile(&Source::Recipe(recipe.into(), None), options, &Silent).expect("it compiles").file
}

/// Tactics that choose the library wherever it is a candidate.
fn everywhere(options: &CompileOptions) -> Tactics {
    let tuning = Tuning::of(&plan_with(options).manifest, Libraries::Asked);
    let can = tuning.problems().filter(|(_, names)| names.contains(&"cublaslt"));
    let chosen: BTreeMap<String, String> = can.map(|(key, names)| (key.to_owned(), names[0].to_owned())).collect();
    let library = chosen.keys().map(|key| (key.clone(), "cublaslt".to_owned())).collect();
    Tactics { chosen, library, ..Tactics::default() }
}

fn by_library() -> PlanFile {
    let options = options(Libraries::Asked);
    plan_with(&CompileOptions { tactics: everywhere(&options), ..options })
}

fn calls(file: &PlanFile) -> Vec<(Phase, &Step, LibraryMatmul)> {
    let buckets = file.manifest.ranks[0].buckets.iter();
    let of_bucket = |bucket: &'_ plan::Bucket| bucket.phase;
    buckets
        .flat_map(|bucket| bucket.steps.iter().map(move |step| (of_bucket(bucket), step)))
        .filter_map(|(phase, step)| match step.library? {
            LibraryCall::Matmul(matmul) => Some((phase, step, matmul)),
        })
        .collect()
}

fn workspace(file: &PlanFile) -> Option<u64> {
    let states = &file.manifest.ranks[0].states;
    states.iter().find(|state| state.role == StateRole::Workspace)?.ty.bytes()
}

#[test]
fn dense_products_of_prompts_are_calls_where_tactics_say_so() {
    let file = by_library();
    let found = calls(&file);
    assert!(found.iter().all(|(phase, ..)| *phase == Phase::Prefill));
    let residuals = found.iter().filter(|(_, _, call)| call.residual.is_some()).count();
    assert!(residuals > 4 && residuals < found.len(), "{residuals} of {}", found.len());
    for (_, step, call) in &found {
        assert!(step.launch.is_none() && step.collective.is_none(), "{}", step.name);
        assert_eq!(call.residual.is_some(), step.name.ends_with("matmul+residual"), "{}", step.name);
    }
    assert_eq!(workspace(&file), Some(plan::WORKSPACE_BYTES));
    let rows: std::collections::BTreeSet<u64> = found.iter().map(|(_, _, call)| call.rows).collect();
    assert!(rows.contains(&16) && rows.contains(&300), "{rows:?}");
    assert_eq!(PlanFile::from_bytes(&file.to_bytes()).expect("it holds"), file);
}

#[test]
fn without_the_option_plans_are_as_they_were_whatever_a_lock_says() {
    let default = plan_with(&options(Libraries::Never));
    let known = everywhere(&options(Libraries::Asked));
    let never = plan_with(&CompileOptions { tactics: known, ..options(Libraries::Never) });
    assert!(calls(&never).is_empty() && workspace(&never).is_none());
    assert_eq!(never.to_bytes(), default.to_bytes());
    // Nor is it a default.
    let asked = plan_with(&options(Libraries::Asked));
    assert_eq!(asked.to_bytes(), default.to_bytes());
    // For measurements there is room, whichever is chosen, and all else is alike.
    let all = options(Libraries::All);
    let (kernels, library) = (plan_with(&all), plan_with(&CompileOptions { tactics: everywhere(&all), ..all.clone() }));
    assert!(calls(&kernels).is_empty() && !calls(&library).is_empty());
    let bare = |file: &PlanFile| {
        let mut program = file.manifest.ranks[0].clone();
        for step in program.buckets.iter_mut().flat_map(|bucket| &mut bucket.steps) {
            (step.launch, step.library) = (None, None);
        }
        program
    };
    assert_eq!(bare(&kernels), bare(&library));
    assert_eq!(workspace(&kernels), Some(plan::WORKSPACE_BYTES));
}

/// Where products of one layer are side by side, their calls are not.
#[test]
fn calls_come_one_after_the_other_whatever_is_left_out() {
    let every_pass: Vec<String> = passes::names().into_iter().map(str::to_owned).collect();
    let mut added = 0;
    for disabled in [vec![], vec!["merge-projections".to_owned()], every_pass] {
        let options = CompileOptions { disabled, ..options(Libraries::Asked) };
        let file = plan_with(&CompileOptions { tactics: everywhere(&options), ..options.clone() });
        file.validate().expect("calls are in order");
        assert!(calls(&file).len() > 4);
        let after = |file: &PlanFile| -> usize {
            file.manifest.ranks[0].buckets.iter().flat_map(|bucket| &bucket.steps).map(|step| step.after.len()).sum()
        };
        added += after(&file) - after(&plan_with(&options));
    }
    assert!(added > 0, "expected branches");
}

/// Graphs of one product, such as the GPU's tests compare.
#[test]
fn products_of_each_type_are_calls() {
    let cases = [
        ("f32", "f32", true),
        ("bf16", "bf16", true),
        ("f16", "f16", true),
        ("bf16", "f32", true),
        ("f32", "f32", false),
    ];
    for (x, y, chunks) in cases {
        let columns = if chunks { 264 } else { 262 };
        for (stream, sum, last) in [
            (String::new(), String::new(), "o"),
            (
                format!(", %h: {y}[80,{columns}]"),
                format!("  %sum = add %o, %h : {y}[80,{columns}] in layers.0.ffn\n"),
                "sum",
            ),
        ] {
            let text = format!(
                "graph @product (%x: {x}[80,200]{stream}) {{\n  weight @w : {x}[{columns},200]\n  %o = matmul %x, @w : {y}[80,{columns}] \
                 in layers.0.ffn\n{sum}  return %{last}\n}}\n"
            );
            let graph = lfm2c::ir::parse(&text).unwrap_or_else(|fault| panic!("{fault}\n{text}")).graph;
            let source = Source::Graph("product".into(), Box::new(graph));
            let compiled = |tactics| {
                let options = CompileOptions {
                    target: Target::Sm90a,
                    without_cubins: true,
                    libraries: Libraries::Asked,
                    tactics,
                    ..CompileOptions::default()
                };
                compile(&source, &options, &Silent).expect("it compiles").file
            };
            let problems = Tuning::of(&compiled(Tactics::default()).manifest, Libraries::Asked);
            let chosen = problems.problems().map(|(key, _)| (key.to_owned(), "cublaslt".to_owned())).collect();
            let file = compiled(Tactics { chosen, ..Tactics::default() });
            let steps = &file.manifest.ranks[0].buckets[0].steps;
            assert!(steps.len() == 1 && steps[0].library.is_some() == chunks, "{text}{steps:?}");
        }
    }
}

#[test]
fn what_follows_a_call_reads_nothing_early_that_the_call_makes() {
    // Where a kernel releases late, what follows reads early what steps before that kernel made. A call never does.
    let mut file = by_library();
    let steps = &mut file.manifest.ranks[0].buckets[0].steps;
    let reads = |pair: &[Step]| -> Option<u32> {
        pair[1].launch.as_ref().filter(|_| pair[0].library.is_some())?;
        let at = pair[1].reads.iter().position(|read| pair[0].writes.contains(read))?;
        u32::try_from(at).ok()
    };
    let followers: Vec<(usize, u32)> =
        steps.windows(2).enumerate().filter_map(|(i, pair)| Some((i + 1, reads(pair)?))).collect();
    assert!(followers.len() > 3, "{followers:?}");
    for &(at, read) in &followers {
        let launch = steps[at].launch.as_mut().expect("it is one");
        assert!(!launch.early.contains(&read), "{}", steps[at].name);
    }
    let (at, read) = followers[0];
    steps[at].launch.as_mut().expect("it is one").early.push(read);
    let name = steps[at].name.clone();
    let Err(PlanError::Invalid(faults)) = file.validate() else { panic!("expected faults") };
    let told = faults.iter().map(|fault| format!("{fault}\n")).collect::<String>();
    assert!(told.contains(&name) && told.contains("`early`: reads"), "{told}");
}

/// Changes the first call that adds a residual, and gives what the validator says.
fn fault(change: impl FnOnce(&mut Manifest, usize, &mut LibraryMatmul)) -> String {
    let mut file = by_library();
    let steps = &file.manifest.ranks[0].buckets[0].steps;
    let matmul = |step: &Step| match step.library? {
        LibraryCall::Matmul(call) => call.residual.map(|_| call),
    };
    let (at, mut call) = steps.iter().enumerate().find_map(|(i, step)| Some((i, matmul(step)?))).expect("one adds");
    change(&mut file.manifest, at, &mut call);
    if let Some(library) = &mut file.manifest.ranks[0].buckets[0].steps[at].library {
        *library = LibraryCall::Matmul(call);
    }
    match file.validate() {
        Err(PlanError::Invalid(faults)) => faults.iter().map(|fault| format!("{fault}\n")).collect(),
        other => panic!("expected faults, found {other:?}"),
    }
}

#[test]
fn wrong_calls_are_named() {
    type Change = fn(&mut Manifest, usize, &mut LibraryMatmul);
    fn step(manifest: &mut Manifest, at: usize) -> &mut Step {
        &mut manifest.ranks[0].buckets[0].steps[at]
    }
    fn room(manifest: &mut Manifest) -> &mut plan::State {
        let states = &mut manifest.ranks[0].states;
        states.iter_mut().find(|state| state.role == StateRole::Workspace).expect("there is a workspace")
    }
    const BY_MEANING: &str = "`library`: expected Matmul(";
    let cases: [(Change, &str); 15] = [
        (|_, _, call| call.rows += 1, BY_MEANING),
        (|_, _, call| call.columns -= 8, BY_MEANING),
        (|_, _, call| call.depth /= 2, BY_MEANING),
        (|_, _, call| call.dtype = plan::DType::F16, BY_MEANING),
        (|_, _, call| call.made = plan::DType::F32, BY_MEANING),
        (|_, _, call| call.x = 1, BY_MEANING),
        (|_, _, call| call.weight = 99, BY_MEANING),
        (|_, _, call| call.residual = None, BY_MEANING),
        (|_, _, call| call.result = 1, BY_MEANING),
        (|_, _, call| call.workspace += 1, "expected a workspace of 33554433 bytes, found one of 33554432"),
        (|m, _, _| room(m).role = StateRole::LastToken, "expected at most one LastToken"),
        (|m, at, _| step(m, at).launch = step(m, 0).launch.clone(), "found two of them"),
        // A step of another meaning.
        (|m, at, _| step(m, 0).library = step(m, at).library, "found two of them"),
        (
            |m, at, _| {
                let library = step(m, at).library;
                (step(m, 0).launch, step(m, 0).library) = (None, library);
            },
            "`library`: expected none, by what the step computes",
        ),
        (|m, at, _| step(m, at).library = None, "expected a launch, found none"),
    ];
    for (change, expected) in cases {
        let found = fault(change);
        assert!(found.contains(expected), "expected `{expected}`, found {found}");
    }
    let without = fault(|m, _, _| {
        let at = m.ranks[0].states.iter().position(|state| state.role == StateRole::Workspace).expect("there is one");
        m.ranks[0].states.remove(at);
    });
    assert!(
        without.contains("expected a workspace of") && without.contains("among the states, found none"),
        "{without}"
    );
    let on_cpu = fault(|m, _, _| {
        m.target = plan::Target::Cpu;
        m.kernels.clear();
        m.services.clear();
    });
    assert!(on_cpu.contains("expected no library's call in a plan for the CPU"), "{on_cpu}");
    // Products that could be side by side.
    let options = CompileOptions { disabled: vec!["merge-projections".into()], ..options(Libraries::Asked) };
    let mut file = plan_with(&CompileOptions { tactics: everywhere(&options), ..options.clone() });
    let free = plan_with(&options);
    let [rank, free] = [&mut file.manifest.ranks[0], &mut free.manifest.ranks[0].clone()];
    for (bucket, free) in rank.buckets.iter_mut().zip(&free.buckets) {
        for (step, free) in bucket.steps.iter_mut().zip(&free.steps) {
            step.after.clone_from(&free.after);
        }
    }
    let Err(PlanError::Invalid(faults)) = file.validate() else { panic!("expected faults") };
    assert!(faults[0].to_string().contains("a library's call: expected one after step"), "{}", faults[0]);
}

#[test]
fn the_command_line_asks_for_libraries_and_a_lock_chooses_them() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    std::fs::copy(project("plans/synthetic.ron"), at.join("demo.ron")).expect("it can be copied");
    let compile = |name: &str, more: &[&str]| {
        let fixed = ["compile", "demo.ron", "--target", "sm_90a", "--without-cubins", "--dtype", "bf16", "-o", name];
        done(at, &[&fixed[..], &["--prefill", "64", "--decode", "1"], more].concat())
    };
    compile("bare.plan", &["--no-lock"]);
    let bare = PlanFile::read(&at.join("bare.plan")).expect("it is a plan");
    let tuning = Tuning::of(&bare.manifest, Libraries::Asked);
    let entry = |names: &[&str]| Measured {
        chosen: names[0].to_owned(),
        packed: None,
        library: names.contains(&"cublaslt").then(|| "cublaslt".to_owned()),
        candidates: BTreeMap::new(),
    };
    let lock = Lock {
        version: LOCK_VERSION,
        compiler: env!("CARGO_PKG_VERSION").into(),
        gpu: "NVIDIA H200".into(),
        toolkit: (13, 0),
        graphs: BTreeMap::new(),
        problems: tuning.problems().map(|(key, names)| (key.to_owned(), entry(&names))).collect(),
    };
    lock.write(&at.join("demo.lock.ron")).expect("it can be written");
    let text = std::fs::read_to_string(at.join("demo.lock.ron")).expect("it was written");
    assert!(text.contains("library: Some(\"cublaslt\")") || text.contains("library: \"cublaslt\""), "{text}");
    assert_eq!(Lock::parse(&text).expect("it is a lock"), lock);

    compile("kernels.plan", &[]);
    compile("library.plan", &["--libraries", "cublaslt"]);
    let read = |name: &str| PlanFile::read(&at.join(name)).expect("it is a plan");
    assert!(calls(&read("kernels.plan")).is_empty());
    let by_library = read("library.plan");
    assert!(calls(&by_library).len() > 2 && workspace(&by_library).is_some());
    // The CPU executor reads what steps mean.
    let run = |plan| done(at, &["run", plan, "--device", "cpu", "--max-new-tokens", "4"]);
    assert_eq!(run("library.plan"), run("kernels.plan"));
    let steps = done(at, &["inspect", "library.plan", "--bucket", "prefill_64"]);
    let named = steps.lines().filter(|line| line.trim_end().ends_with("cublaslt")).count();
    assert_eq!(named, calls(&by_library).len(), "{steps}");
    done(at, &["dot", "library.plan", "--bucket", "prefill_64"]);

    let usage = lfm2c(at, &["compile", "demo.ron", "--target", "sm_90a", "--tune=libraries", "-o", "x.plan"]);
    let errors = String::from_utf8_lossy(&usage.stderr);
    assert!(usage.status.code() == Some(2) && errors.contains("--libraries cublaslt"), "{errors}");
    let unknown = lfm2c(at, &["compile", "demo.ron", "--libraries", "blas", "-o", "x.plan"]);
    assert_eq!(unknown.status.code(), Some(2));
}
