//! Which weights get a packed form: those of which a launch reads it.

use std::collections::BTreeSet;

use super::select::{Pack, Selector};
use crate::plan::{ALIGNMENT, Arg, Bucket, Launch, Packed, Ref, Weight};

/// Whether what a launch wants packed are weights that can be. In a graph in text form it may be a value that a step makes.
pub(super) fn fits(launch: &Launch, reads: &[Ref], weights: &[Weight], selector: &Selector) -> bool {
    let fits = |arg: &Arg| match *arg {
        Arg::Packed(i) => match reads.get(i as usize) {
            Some(&Ref::Weight(weight)) => weights.get(weight as usize).is_some_and(|weight| selector.packs(weight)),
            _ => false,
        },
        _ => true,
    };
    launch.args.iter().all(fits)
}

/// The packed forms of weights that end at `end`, which moves on to the end of what is returned.
///
/// # Errors
/// Sizes beyond 64 bits.
pub(super) fn forms(
    weights: &[Weight],
    buckets: &[Bucket],
    selector: &Selector,
    end: &mut u64,
) -> Result<Vec<Packed>, String> {
    let all = (0u32..).zip(weights).filter(|(_, weight)| selector.pack() == Pack::All && selector.packs(weight));
    let mut wanted: BTreeSet<u32> = all.map(|(weight, _)| weight).collect();
    for step in buckets.iter().flat_map(|bucket| &bucket.steps) {
        let args = step.launch.iter().flat_map(|launch| &launch.args);
        wanted.extend(args.filter_map(|arg| match *arg {
            Arg::Packed(i) => match step.reads.get(i as usize)? {
                Ref::Weight(weight) => Some(*weight),
                _ => None,
            },
            _ => None,
        }));
    }
    let mut forms = vec![];
    for weight in wanted {
        let Some(bytes) = weights.get(weight as usize).and_then(Weight::packed_bytes) else {
            return Err(format!("weight {weight} is wanted packed, but cannot be; this is a bug of lfm2c"));
        };
        forms.push(Packed { weight, offset: *end });
        let next = end.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        *end = next.ok_or("the packed weights exceed 64 bits")?;
    }
    Ok(forms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codegen::compile::Silent;
    use crate::codegen::select::{F32, Tactics};
    use crate::codegen::{CompileOptions, Recipe, Source, compile};
    use crate::plan::{PlanFile, ServiceRole};

    fn plan(pack: Pack) -> PlanFile {
        plan_leaving(pack, BTreeSet::new())
    }

    fn plan_leaving(pack: Pack, unpacked: BTreeSet<String>) -> PlanFile {
        let recipe = Recipe::parse(include_str!("../../plans/synthetic.ron")).expect("the recipe is valid");
        let options = CompileOptions {
            target: crate::passes::Target::Sm90a,
            dtype: Some(crate::ir::DType::BF16),
            prefill: Some(vec![]),
            decode: Some(vec![1, 4]),
            without_cubins: true,
            pack,
            unpacked,
            ..CompileOptions::default()
        };
        compile(&Source::Recipe(recipe.into(), None), &options, &Silent).expect("it compiles").file
    }

    #[test]
    fn what_a_launch_wants_packed_lies_behind_the_weights_once() {
        let mut file = plan(Pack::Never);
        let program = &mut file.manifest.ranks[0];
        assert_eq!(program.packed, []);
        let end = program.pool.weights.bytes;
        let can = |weights: &[Weight], place: &Ref| matches!(place, Ref::Weight(weight) if weights[*weight as usize].packed_bytes().is_some());
        let tactics = Tactics::default();
        let selector = Selector::new(&tactics, F32::Exact, Pack::Asked);
        let mut wanted = BTreeSet::new();
        for step in program.buckets.iter_mut().flat_map(|bucket| &mut bucket.steps) {
            let at = step.reads.iter().position(|place| can(&program.weights, place));
            if let (Some(at), Some(launch)) = (at, &mut step.launch) {
                launch.args.push(Arg::Packed(at as u32));
                assert!(fits(launch, &step.reads, &program.weights, &selector));
                let Ref::Weight(weight) = step.reads[at] else { unreachable!("it is one") };
                wanted.insert(weight);
                launch.args.push(Arg::Packed(step.reads.len() as u32));
                assert!(!fits(launch, &step.reads, &program.weights, &selector));
                launch.args.pop();
            }
        }
        assert!(wanted.len() > 3);
        let mut last = end;
        let forms = forms(&program.weights, &program.buckets, &selector, &mut last).expect("they fit");
        assert_eq!(forms.iter().map(|form| form.weight).collect::<BTreeSet<_>>(), wanted);
        assert_eq!(forms.len(), wanted.len());
        let bytes = |form: &Packed| program.weights[form.weight as usize].packed_bytes().expect("it can be packed");
        let mut at = end;
        for form in &forms {
            assert_eq!(form.offset, at);
            at = (at + bytes(form)).next_multiple_of(ALIGNMENT);
        }
        assert_eq!(at, last);
    }

    #[test]
    fn kernels_of_few_rows_ask_for_packed_weights_unless_told_not_to() {
        let asks = |file: &PlanFile| -> BTreeSet<u32> {
            let steps = file.manifest.ranks[0].buckets.iter().flat_map(|bucket| &bucket.steps);
            let asked = |step: &crate::plan::Step| -> Vec<u32> {
                let args = step.launch.iter().flat_map(|launch| &launch.args);
                let weight = |i: u32| match step.reads[i as usize] {
                    Ref::Weight(weight) => weight,
                    place => panic!("{place:?} is packed"),
                };
                args.filter_map(|arg| if let Arg::Packed(i) = *arg { Some(weight(i)) } else { None }).collect()
            };
            steps.flat_map(asked).collect()
        };
        let (file, bare) = (plan(Pack::Asked), plan(Pack::Never));
        let forms: BTreeSet<u32> = file.manifest.ranks[0].packed.iter().map(|form| form.weight).collect();
        assert!(forms.len() > 3 && asks(&file) == forms, "{forms:?}");
        assert!(asks(&bare).is_empty() && bare.manifest.ranks[0].packed.is_empty());
    }

    #[test]
    fn what_does_not_pack_is_read_as_it_is() {
        let all = plan(Pack::Asked);
        let name = |file: &PlanFile, form: &Packed| file.manifest.ranks[0].weights[form.weight as usize].name.clone();
        let names = |file: &PlanFile| -> Vec<String> {
            file.manifest.ranks[0].packed.iter().map(|form| name(file, form)).collect()
        };
        let left = names(&all)[1].clone();
        let some = plan_leaving(Pack::Asked, [left.clone()].into());
        let expected: Vec<String> = names(&all).into_iter().filter(|name| *name != left).collect();
        assert_eq!(names(&some), expected);
        let every = plan_leaving(Pack::All, [left.clone()].into());
        assert!(!names(&every).contains(&left) && names(&every).len() > expected.len());
    }

    #[test]
    fn all_that_can_be_packed_is_where_that_is_asked_for() {
        let (file, bare) = (plan(Pack::All), plan(Pack::Never));
        let (all, none) = (&file.manifest.ranks[0], &bare.manifest.ranks[0]);
        let can = all.weights.iter().filter(|weight| weight.packed_bytes().is_some()).count();
        assert!(can > 3 && all.packed.len() == can);
        assert!(all.pool.weights.bytes > none.pool.weights.bytes);
        let has = |file: &PlanFile| file.manifest.services.iter().any(|service| service.0 == ServiceRole::Pack);
        assert!(has(&file) && !has(&bare));
        let read = PlanFile::from_bytes(&file.to_bytes()).expect("a valid plan");
        assert_eq!(read, file);
    }
}
