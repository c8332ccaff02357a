//go:build race

package cryptohook

// underRace says that the race detector is on: everything takes several times as long.
const underRace = true
