//! Rules for the values of a file, one by one and together.

mod access;
mod checker;
mod clients;
mod listeners;
mod tls;
mod topics;
mod upstream;

use std::time::Duration;

use crate::config::document::Document;
use crate::config::error::Problem;
use crate::config::types::Config;

use checker::{Checker, HOUR};

/// Adds all problems of a configuration.
pub(super) fn check(config: &Config, doc: &Document<'_>, problems: &mut Vec<Problem>) {
    let mut checker = Checker { doc, problems };
    node(&mut checker, config);
    checker.tls(config);
    checker.listeners(config);
    checker.upstream(config);
    checker.session(config);
    checker.limits(config);
    memory(&mut checker, config);
    checker.auth(config);
    checker.acl(config);
    log(&mut checker, config);
    checker.range_time("drain.grace", config.drain.grace, Duration::ZERO..=HOUR);
}

fn node(checker: &mut Checker<'_, '_>, config: &Config) {
    if config.node.id.is_empty() {
        checker.say(
            "node.id",
            "required, unless upstream.servers is [\"embedded:\"]: a name that stays the \
             same over restarts and that no other Tidegate at the same broker has",
        );
    } else {
        checker.name("node.id", &config.node.id);
    }
}

fn memory(checker: &mut Checker<'_, '_>, config: &Config) {
    let memory = &config.memory;
    if memory.queues > memory.max {
        checker.say("memory.queues", "larger than memory.max");
    }
    if memory.sessions > memory.max {
        checker.say("memory.sessions", "larger than memory.max");
    }
    let up = &config.upstream;
    let sum = memory
        .sessions
        .saturating_add(memory.queues)
        .saturating_add(up.publishes_waiting)
        .saturating_add(up.retained_cache);
    if sum > memory.max {
        checker.say(
            "memory.max",
            format!(
                "{} bytes cannot hold memory.sessions ({}), memory.queues ({}), \
                 upstream.publishes_waiting ({}) and upstream.retained_cache ({}) together",
                memory.max, memory.sessions, memory.queues, up.publishes_waiting, up.retained_cache
            ),
        );
    }
}

fn log(checker: &mut Checker<'_, '_>, config: &Config) {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for directive in config.log.level.split(',') {
        let level = directive.rsplit('=').next().unwrap_or(directive);
        if !LEVELS.contains(&level) {
            let message = crate::config::units::not_a_choice(level, &LEVELS, &[]);
            checker.say("log.level", message);
        }
    }
}
