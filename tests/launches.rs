//! Plans for a GPU, as far as they can be checked without one: every step has a launch, the validator knows a wrong one, and a
//! pass fuses only what some kernel can run.

use std::collections::BTreeSet;

use lfm2c::codegen::compile::Silent;
use lfm2c::codegen::select::Tactics;
use lfm2c::codegen::{CompileOptions, Recipe, Source, compile};
use lfm2c::ir::DType;
use lfm2c::passes::{self, Target};
use lfm2c::plan::{
    self, Arg, CollectiveKind, Manifest, Param, ParamType, PlanError, PlanFile, Promotion, ServiceRole, Swizzle,
    TensorMap,
};

fn plan(disabled: Vec<String>) -> PlanFile {
    plan_in(None, disabled)
}

fn plan_in(dtype: Option<DType>, disabled: Vec<String>) -> PlanFile {
    plan_on(1, dtype, disabled)
}

fn plan_on(expert_ranks: u64, dtype: Option<DType>, disabled: Vec<String>) -> PlanFile {
    plan_with(CompileOptions { expert_ranks, dtype, disabled, ..CompileOptions::default() })
}

fn plan_with(options: CompileOptions) -> PlanFile {
    let recipe = Recipe::parse(include_str!("../plans/synthetic.ron")).expect("the demo recipe is valid");
    let options = CompileOptions {
        target: Target::Sm90a,
        without_cubins: true,
        prefill: Some(vec![16, 300]),
        decode: Some(vec![1, 16]),
        ..options
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

#[test]
fn what_ranks_do_together_has_no_launch_and_all_else_has_one() {
    let every_pass = passes::names().into_iter().filter(|name| *name != "expert-parallel").map(str::to_owned).collect();
    for (ranks, dtype, disabled) in
        [(2, DType::F32, vec![]), (2, DType::F32, every_pass), (3, DType::BF16, vec![]), (8, DType::F16, vec![])]
    {
        let file = plan_on(ranks, Some(dtype), disabled);
        let Manifest { ranks: programs, kernels, .. } = &file.manifest;
        assert_eq!(programs.len() as u64, ranks);
        let mut launched = BTreeSet::new();
        for step in programs.iter().flat_map(|program| &program.buckets).flat_map(|bucket| &bucket.steps) {
            assert_ne!(step.launch.is_some(), step.collective.is_some(), "{}", step.name);
            launched.extend(step.launch.as_ref().map(|launch| launch.kernel));
        }
        // Ranks have their experts from arguments, and share kernels otherwise, too.
        let services: BTreeSet<u32> = file.manifest.services.iter().map(|service| service.1).collect();
        assert!((0..kernels.len() as u32).all(|kernel| launched.contains(&kernel) || services.contains(&kernel)));
        let exchanges: Vec<ServiceRole> = file
            .manifest
            .services
            .iter()
            .map(|service| service.0)
            .filter(|role| matches!(role, ServiceRole::Exchange(..)))
            .collect();
        assert_eq!(exchanges, [ServiceRole::Exchange(ranks, 1), ServiceRole::Exchange(ranks, 3)]);
        let local: Vec<_> = kernels.iter().filter(|kernel| kernel.name == "local_experts").collect();
        assert_eq!(local.len(), 1, "{local:?}");
        assert_eq!(PlanFile::from_bytes(&file.to_bytes()).expect("it holds"), file);
    }
}

/// Ranks of a stage exchange by the kernels of as many ranks, and sends need none.
#[test]
fn stages_of_several_ranks_exchange_like_so_many() {
    let file = plan_with(CompileOptions { expert_ranks: 2, pipeline_ranks: 3, ..CompileOptions::default() });
    assert_eq!(file.manifest.ranks.len(), 6);
    let roles = file.manifest.services.iter().map(|service| service.0);
    let exchanges: Vec<ServiceRole> = roles.filter(|role| matches!(role, ServiceRole::Exchange(..))).collect();
    assert_eq!(exchanges, [ServiceRole::Exchange(2, 1), ServiceRole::Exchange(2, 3)]);
    let two = plan_on(2, None, vec![]);
    let sources = |file: &PlanFile| -> BTreeSet<String> {
        file.manifest.kernels.iter().map(|kernel| kernel.source.clone()).collect()
    };
    assert!(sources(&file).is_subset(&sources(&two)));
    assert_eq!(PlanFile::from_bytes(&file.to_bytes()).expect("it holds"), file);
}

/// A stage's steps are those of one rank with all layers, so its kernels are.
#[test]
fn stages_need_no_kernels_of_their_own() {
    let one = plan(vec![]);
    for ranks in [2, 6] {
        let file = plan_with(CompileOptions { pipeline_ranks: ranks, ..CompileOptions::default() });
        for program in &file.manifest.ranks {
            for (bucket, alone) in program.buckets.iter().zip(&one.manifest.ranks[0].buckets) {
                for (i, step) in bucket.steps.iter().enumerate() {
                    assert_ne!(step.launch.is_some(), step.collective.is_some(), "{}", step.name);
                    // One after the other, so that nothing runs beside what waits for another rank.
                    assert_eq!(step.after, (0..i as u32).last().into_iter().collect::<Vec<_>>(), "{}", step.name);
                }
                assert!(
                    bucket.steps.iter().filter(|step| step.launch.is_some()).count()
                        <= ranks as usize * alone.steps.len()
                );
            }
        }
        let sources = |file: &PlanFile| -> BTreeSet<String> {
            file.manifest.kernels.iter().map(|kernel| kernel.source.clone()).collect()
        };
        assert!(sources(&file).is_subset(&sources(&one)));
        assert_eq!(PlanFile::from_bytes(&file.to_bytes()).expect("it holds"), file);
    }
}

#[test]
fn wrong_collectives_are_named() {
    type Change = fn(&mut Manifest);
    /// The step of a rank that is this many after its first collective.
    fn after(manifest: &mut Manifest, rank: usize, count: usize) -> &mut plan::Step {
        let steps = &mut manifest.ranks[rank].buckets[0].steps;
        let first = steps.iter().position(|step| step.collective.is_some()).expect("there are collectives");
        &mut steps[first + count]
    }
    let cases: [(Change, &str); 6] = [
        (|m| after(m, 0, 0).launch = Some(launch(m).clone()), "expected no launch of what ranks do together"),
        (|m| after(m, 1, 0).collective = None, "expected a launch, found none"),
        (|m| after(m, 1, 1).launch = None, "expected a launch, found none"),
        (|m| collective(after(m, 1, 0)).parts[0].1 += 1, "rank 1, bucket prefill_16"),
        (|m| collective(after(m, 0, 0)).kind = CollectiveKind::AllToAll, "`collective`: expected Some("),
        // What the collective before writes.
        (|m| early(after(m, 0, 1)), "`early`: reads [0] are read before the kernel waits"),
    ];
    for (change, expected) in cases {
        let mut file = plan_on(2, None, vec![]);
        change(&mut file.manifest);
        let found = faults(&file);
        assert!(found.contains(expected), "expected `{expected}`, found {found}");
    }
}

fn collective(step: &mut plan::Step) -> &mut plan::Collective {
    step.collective.as_mut().expect("it is one")
}

/// Lets a step read its first operand before it waits.
fn early(step: &mut plan::Step) {
    step.launch.as_mut().expect("it has one").early = vec![0];
}

/// Changes the manifest, and gives what the validator says.
fn fault(change: impl FnOnce(&mut Manifest)) -> String {
    let mut file = plan(vec![]);
    change(&mut file.manifest);
    faults(&file)
}

fn faults(file: &PlanFile) -> String {
    match file.validate() {
        Err(PlanError::Invalid(faults)) => faults.iter().map(|fault| format!("{fault}\n")).collect(),
        other => panic!("expected faults, found {other:?}"),
    }
}

#[test]
fn wrong_launches_are_named() {
    type Change = fn(&mut Manifest);
    let cases: [(Change, &str); 17] = [
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
        (|m| m.services[0].1 = 9999, "9999): expected one of"),
        (|m| m.services[0].1 = launch(m).kernel, "expected parameters [Out("),
        (|m| m.services[1].0 = m.services[0].0, "is there more than once"),
        (|m| m.services[0].0 = ServiceRole::Exchange(u64::MAX, 1), "expected 2..=8 ranks and 1..=4 parts"),
    ];
    for (change, expected) in cases {
        let found = fault(change);
        assert!(found.contains(expected), "expected `{expected}`, found {found}");
    }
    let without_form = fault(|m| {
        let kernel = launch(m).kernel as usize;
        let argument = launch(m).args.iter().position(|arg| matches!(arg, Arg::Read(_))).expect("it reads");
        launch(m).args[argument] = Arg::Packed(1);
        m.kernels[kernel].params[argument].1 = ParamType::In(plan::DType::I32);
    });
    assert!(without_form.contains("Packed(1): expected a weight with a packed form, found"), "{without_form}");
    let other_type = fault(|m| {
        let kernel = launch(m).kernel as usize;
        let Param(_, ty) = &mut m.kernels[kernel].params[0];
        *ty = ParamType::Int;
    });
    assert!(other_type.contains("expected Int, found"), "{other_type}");
    let on_cpu = fault(|m| m.target = lfm2c::plan::Target::Cpu);
    assert!(on_cpu.contains("none for the CPU"), "{on_cpu}");
}

/// What the validator says of a tensor map of a step's read, of `[rows, columns]` elements of two bytes: nothing if it is sound.
fn map_fault(change: impl FnOnce(&mut TensorMap, [u64; 2])) -> String {
    let mut file = plan(vec![]);
    let program = &mut file.manifest.ranks[0];
    let matrix = |ty: &lfm2c::plan::TensorType| {
        ty.1.len() == 2 && ty.0 == plan::DType::F32 && ty.1[1].is_multiple_of(4) && ty.1[0] > 4
    };
    let fits = |step: &lfm2c::plan::Step| {
        let read = program.semantics[step.op as usize].inputs.iter().position(matrix)? as u32;
        let launch = step.launch.as_ref()?;
        let arg = launch.args.iter().position(|arg| *arg == Arg::Read(read))?;
        Some((read, arg, launch.kernel as usize))
    };
    let found = program.buckets[0].steps.iter().enumerate().find_map(|(i, step)| Some((i, fits(step)?)));
    let (at, (read, arg, kernel)) = found.expect("a step reads a matrix");
    let step = &mut program.buckets[0].steps[at];
    let shape: [u64; 2] = program.semantics[step.op as usize].inputs[read as usize].1[..].try_into().expect("a matrix");
    let [rows, columns] = shape;
    let mut map = TensorMap {
        read,
        sizes: [columns, rows, 1],
        strides: [4 * columns, 4 * columns * rows],
        tile: [32, 64, 1],
        swizzle: Swizzle::Bytes128,
        promotion: Promotion::Bytes256,
    };
    change(&mut map, shape);
    // The kernel's other launches go on passing addresses, which is told of them and not of this one.
    let name = step.name.clone();
    step.launch.as_mut().expect("it has one").args[arg] = Arg::Map(map);
    file.manifest.kernels[kernel].params[arg].1 = ParamType::Map(plan::DType::F32);
    match file.validate() {
        Err(PlanError::Invalid(faults)) => {
            let own = faults.iter().map(|fault| format!("{fault}\n"));
            own.filter(|fault| fault.contains("prefill_16") && fault.contains(&format!("step {name}:"))).collect()
        }
        other => other.map(|()| String::new()).expect("faults are faults of the plan"),
    }
}

#[test]
fn tensor_maps_stay_inside_of_their_tensors_and_of_the_devices_limits() {
    assert_eq!(map_fault(|_, _| ()), "");
    type Change = fn(&mut TensorMap, [u64; 2]);
    let cases: [(Change, &str); 9] = [
        (|map, [rows, _]| map.sizes[1] = rows + 1, "it ends at byte"),
        (|map, _| map.sizes[2] = 2, "it ends at byte"),
        (|map, _| map.strides[0] += 16, "it ends at byte"),
        (|map, _| map.strides[0] -= 8, "takes no such map"),
        (|map, _| map.tile[1] = 257, "takes no such map"),
        (|map, _| map.tile[0] = 33, "takes no such map"),
        (|map, _| map.swizzle = Swizzle::Bytes64, "takes no such map"),
        (|map, _| map.sizes[0] = 0, "takes no such map"),
        (|map, _| map.read = 99, "the step has"),
    ];
    for (change, expected) in cases {
        let found = map_fault(change);
        assert!(found.contains(expected), "expected `{expected}`, found `{found}`");
    }
}

/// The launch of the first step.
fn launch(manifest: &mut Manifest) -> &mut lfm2c::plan::Launch {
    launch_of(manifest, 0)
}

/// One sequence of LFM2-8B-A1B by the kernels that claim work, where there are any.
fn claiming() -> PlanFile {
    let recipe = Recipe::parse(include_str!("../plans/lfm2-8b-a1b.ron")).expect("the recipe is valid");
    let options = CompileOptions {
        target: Target::Sm90a,
        without_cubins: true,
        prefill: Some(vec![]),
        decode: Some(vec![1]),
        // Right behind the first guess.
        tactics: Tactics { nth: Some(2), ..Tactics::default() },
        ..CompileOptions::default()
    };
    compile(&Source::Recipe(Box::new(recipe), None), &options, &Silent).expect("it compiles").file
}

#[test]
fn steps_that_claim_work_have_counters_of_their_own() {
    let counters = |file: &PlanFile| -> Vec<u32> {
        let steps = file.manifest.ranks[0].buckets[0].steps.iter();
        let args = steps.flat_map(|step| &step.launch.as_ref().expect("every step has one").args);
        args.filter_map(|arg| if let Arg::Claim(counter) = arg { Some(*counter) } else { None }).collect()
    };
    let file = claiming();
    let found = counters(&file);
    // The experts' first products, the two dense ones and the head's. Of the others a block has but one item.
    assert_eq!(found.len(), 22 + 2 + 1);
    assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), found.len());
    file.validate().expect("it is sound");

    let faulty = |change: &dyn Fn(&mut u32)| {
        let mut file = file.clone();
        let steps = file.manifest.ranks[0].buckets[0].steps.iter_mut();
        let args = steps.flat_map(|step| &mut step.launch.as_mut().expect("every step has one").args);
        args.for_each(|arg| {
            if let Arg::Claim(counter) = arg {
                change(counter)
            }
        });
        file.validate().expect_err("it is not sound").to_string()
    };
    let beyond = faulty(&|counter| *counter += 1 << 20);
    assert!(beyond.contains("expected one of 127 counters"), "{beyond}");
    let same = faulty(&|counter| *counter = 5);
    assert!(same.contains("expected a counter of the step's own"), "{same}");
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
    // A convolution's state, and the places of rows in it.
    assert_eq!(early(named("norm+matmul+shortconv")).len(), 3);
    // Inputs of the step, and state that no step before writes.
    let given = |place: &&lfm2c::plan::Ref| matches!(place, lfm2c::plan::Ref::Io(_) | lfm2c::plan::Ref::State(_));
    assert_eq!(early(named("attention")).iter().filter(|place| given(place)).count(), 4);
}
