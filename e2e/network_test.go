package e2e

import (
	"bytes"
	"strings"
	"testing"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/proxy"
)

// Synapse refuses such names, but other homeservers need not. What else a network and a homeserver do is played in package soak.
func TestDisplayNamesOf64KiBAreSurvived(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	between := must(proxy.Start(w.server.URL))(t)
	t.Cleanup(between.Close)
	field := []byte(`"displayname":"`)
	name := append(field[:len(field):len(field)], strings.Repeat("\xf0\x9f\x91\xbb\\u202e<b>", 64<<10/14)+"\xff\xfe"...)
	renamed := between.OnAnswer(proxy.Sync, 0, func(_ *proxy.Request, answer *proxy.Answer) bool {
		changed := bytes.ReplaceAll(answer.Body, field, name)
		differs := len(changed) != len(answer.Body)
		answer.Body = changed
		return differs
	})
	bot := w.newBot(t, func(config botproc.Config) { config["homeserver"] = botproc.Config{"address": between.URL} })
	alice, masterKey := w.newStranger(t, "alice")
	room := newRoom(t, true, bot, alice)
	ctx := within(t, patience)
	eventID := must(alice.Send(ctx, room, say("who am I?")))(t)
	expect(t, bot, alice, eventID, unverifiedIdentity(alice, masterKey, sessionID(t, alice, room)))
	if renamed.Used() == 0 {
		t.Error("nobody had such a name")
	}
}
