//! The open-loop load client of patchswitch's demo and tests, and the small servers that go with it.
//!
//! It answers one question: did anybody who used the service notice the switch? So requests are made when they are
//! due, whatever became of the ones before; latency counts from that moment; every request has a number and every
//! failure is kept with all that is known about it; and the times of all answers are kept, so that the longest
//! silence can be found for any window afterwards.
//!
//! | module | what |
//! |---|---|
//! | [`client`] | makes the load |
//! | [`schedule`] | when which request is due |
//! | [`control`] | how a running client is told what to do |
//! | [`record`] | what is kept of a request |
//! | [`report`] | the report, and figures for any window of it |
//! | [`mod@derive`] | what a job of patchswitch did to the traffic |
//! | [`knee`] | how much load the service bears |
//! | [`serve`], [`echo`] | the test servers |
//! | [`http`], [`clock`] | the pieces below |

pub mod client;
pub mod clock;
pub mod control;
pub mod derive;
pub mod echo;
pub mod http;
pub mod knee;
pub mod record;
pub mod report;
pub mod schedule;
pub mod serve;
