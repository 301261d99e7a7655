//! kill -9 of any part, and any two, loses nothing; `make soak` does this fifty times.

use ursa_tests::lab::pair::Pair;
use ursa_tests::lab::soak;

#[test]
fn each_part_and_any_two_may_die() {
    let mut pair = Pair::allowed().unwrap();
    soak::run(&mut pair, soak::TURNS.len(), |number, round| println!("{number}: {round:?}")).unwrap();
}
