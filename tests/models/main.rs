//! Whole models on the CPU executor, from description to tokens.
//!
//! The bug table of LFM2 implementations, and where each bug would show:
//!
//! | bug | test |
//! |---|---|
//! | padding rows run into the convolution state | `bugs::every_prompt_length_in_a_padded_bucket` |
//! | state leaks between sequences packed into one prefill | `bugs::packed_prompts_do_not_see_each_other` |
//! | a second prefill restarts the convolution at zero | `bugs::chunks_continue_the_state`, `goldens::chunked` |
//! | padded rows of a decode bucket overwrite a live slot, or emit NaN | `bugs::three_sequences_in_a_bucket_of_four` |
//! | a reused slot starts from stale state | `bugs::a_reused_slot_starts_fresh`, `generations` |
//! | a conversation cut back goes on with columns that are overwritten | `sessions` |
//! | one-token prompts | every test that goes over lengths begins at 1 |
//! | bias in the weights, softmax for sigmoid, scaling or 1e-6 dropped | `goldens`, sensitive by `router::goldens_tell_router_variants_apart` |
//! | a token's result depends on its batch | `bugs::a_row_has_the_same_bits_in_any_company` |

mod bugs;
mod common;
mod expert_ranks;
mod expert_replicas;
mod expert_stages;
mod generations;
mod goldens;
mod pipeline_ranks;
mod router;
mod sessions;
mod several;
mod text_graph;
