//! Plans for a GPU, as far as they can be checked without one: every step has a launch, the validator knows a wrong one, and a
//! pass fuses only what some kernel can run.

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::ir::DType;
use lfm2c::passes::{self, Target};
use lfm2c::plan::{Arg, Manifest, Param, ParamType, PlanError, PlanFile};

fn plan(disabled: Vec<String>) -> PlanFile {
    plan_in(None, disabled)
}

fn plan_in(dtype: Option<DType>, disabled: Vec<String>) -> PlanFile {
    let recipe = Recipe::parse(include_str!("../plans/synthetic.ron")).expect("the demo recipe is valid");
    let options = CompileOptions {
        target: Target::Sm90a,
        dtype,
        without_cubins: true,
        prefill: Some(vec![16, 300]),
        decode: Some(vec![1, 16]),
        disabled,
        ..CompileOptions::default()
    };
    compile(&Source::Recipe(Box::new(recipe), None), &options, &Silent).expect("it compiles").file
}

#[test]
fn every_step_has_a_launch_whatever_is_left_out() {
    let every_pass = passes::names().into_iter().map(str::to_owned).collect();
    let one_each = passes::names().into_iter().map(|name| vec![name.to_owned()]);
    for disabled in one_each.chain([vec![], every_pass]) {
        let file = plan(disabled.clone());
        for bucket in &file.manifest.ranks[0].buckets {
            for step in &bucket.steps {
                let launch = step.launch.as_ref().unwrap_or_else(|| panic!("{} without {disabled:?}", step.name));
                let kernel = &file.manifest.kernels[launch.kernel as usize];
                assert_eq!(launch.args.len(), kernel.params.len(), "{} of {}", kernel.name, step.name);
            }
        }
        assert!(file.manifest.kernels.iter().all(|kernel| kernel.cubin.is_none()));
    }
}

#[test]
fn a_plan_for_a_gpu_is_the_same_bytes_each_time_and_reads_back() {
    let file = plan(vec![]);
    let bytes = file.to_bytes();
    assert_eq!(plan(vec![]).to_bytes(), bytes);
    assert_eq!(PlanFile::from_bytes(&bytes).expect("it holds"), file);
    let mut with_code = file.clone();
    with_code.cubins = vec![vec![7; 300]; with_code.manifest.kernels.len()];
    with_code.manifest.kernels.iter_mut().zip(0..).for_each(|(kernel, i)| kernel.cubin = Some(i));
    assert_eq!(PlanFile::from_bytes(&with_code.to_bytes()).expect("it holds"), with_code);
}

/// Changes the manifest, and gives what the validator says.
fn fault(change: impl FnOnce(&mut Manifest)) -> String {
    let mut file = plan(vec![]);
    change(&mut file.manifest);
    match file.validate() {
        Err(PlanError::Invalid(faults)) => faults.iter().map(|fault| format!("{fault}\n")).collect(),
        other => panic!("expected faults, found {other:?}"),
    }
}

#[test]
fn wrong_launches_are_named() {
    type Change = fn(&mut Manifest);
    let cases: [(Change, &str); 13] = [
        (|m| m.ranks[0].buckets[0].steps[3].launch = None, "expected a launch, found none"),
        (|m| launch(m).kernel = 9999, "`kernel`: expected one of"),
        (|m| launch(m).grid[1] = 0, "beyond the device's limits: grid"),
        (|m| launch(m).block = 1025, "block 1025"),
        (|m| launch(m).cluster = 3, "cluster 3"),
        (|m| launch(m).shared = 232_449, "232449 bytes of shared memory"),
        (|m| launch(m).args.truncate(1), "arguments for kernel"),
        (|m| launch(m).args[0] = Arg::Float(1.0), "argument `"),
        (|m| launch(m).args[0] = Arg::Read(99), "the step has"),
        (|m| launch(m).early = vec![99], "`early`: expected one of"),
        // What the step before writes.
        (|m| launch_of(m, 1).early = vec![0], "`early`: reads [0] are read before the kernel waits"),
        (|m| m.kernels[0].name = "rm -rf".into(), "expected a C identifier"),
        (|m| m.kernels[0].cubin = Some(0), "`cubin`: expected one of 0 sections"),
    ];
    for (change, expected) in cases {
        let found = fault(change);
        assert!(found.contains(expected), "expected `{expected}`, found {found}");
    }
    let other_type = fault(|m| {
        let kernel = launch(m).kernel as usize;
        let Param(_, ty) = &mut m.kernels[kernel].params[0];
        *ty = ParamType::Int;
    });
    assert!(other_type.contains("expected Int, found"), "{other_type}");
    let on_cpu = fault(|m| m.target = lfm2c::plan::Target::Cpu);
    assert!(on_cpu.contains("none for the CPU"), "{on_cpu}");
}

/// The launch of the first step.
fn launch(manifest: &mut Manifest) -> &mut lfm2c::plan::Launch {
    launch_of(manifest, 0)
}

fn launch_of(manifest: &mut Manifest, step: usize) -> &mut lfm2c::plan::Launch {
    manifest.ranks[0].buckets[0].steps[step].launch.as_mut().expect("every step has one")
}

#[test]
fn what_is_there_is_read_before_the_wait() {
    let file = plan_in(Some(DType::BF16), vec![]);
    let program = &file.manifest.ranks[0];
    let bucket = program.buckets.iter().find(|bucket| bucket.name == "decode_1").expect("it is compiled");
    let early = |name: &str| -> Vec<&lfm2c::plan::Ref> {
        let step = bucket.steps.iter().find(|step| step.name == name).unwrap_or_else(|| panic!("{name}"));
        let launch = step.launch.as_ref().expect("every step has one");
        launch.early.iter().map(|&i| &step.reads[i as usize]).collect()
    };
    // The router's choice is two steps old when the sum over experts begins, and one when their first product does.
    let names: Vec<&str> = bucket.steps.iter().map(|step| step.name.as_str()).collect();
    let named =
        |part: &str| names.iter().find(|name| name.ends_with(part)).unwrap_or_else(|| panic!("{part}: {names:?}"));
    assert_eq!(early(named("expert+combine+residual")).len(), 2);
    assert!(early(named("expert+swiglu")).is_empty());
    // Inputs of the step, and state that no step before writes.
    let given = |place: &&lfm2c::plan::Ref| matches!(place, lfm2c::plan::Ref::Io(_) | lfm2c::plan::Ref::State(_));
    assert_eq!(early(named("attention")).iter().filter(|place| given(place)).count(), 4);
}
