//go:build !faultpoints

// Package faultpoint names the moments at which a crash would hurt most, so that tests can have the program die there. The program as
// it is shipped has none of it: only with the build tag "faultpoints" does [Reach] do anything.
package faultpoint

// Reach is called when the program comes to the point. It does nothing.
func Reach(string) {}
