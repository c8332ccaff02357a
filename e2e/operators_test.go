package e2e

import (
	"fmt"
	"strings"
	"testing"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// court is a bot with operators, and those who are not.
type court struct {
	bot *botproc.Bot
	// olga and otto are operators whose master keys the configuration pins, nina is one whom nobody has verified, zoe one whom olga verifies.
	olga, otto, nina, zoe *people.Person
	olgaKey, zoeKey       id.Ed25519
	// mallory is whom nobody ought to verify.
	mallory    *people.Person
	malloryKey id.Ed25519
	room       id.RoomID
}

func newCourt(t *testing.T) *court {
	t.Helper()
	w := theWorld(t)
	c := new(court)
	var ottoKey id.Ed25519
	c.olga, c.olgaKey = w.newStranger(t, "olga")
	c.otto, ottoKey = w.newStranger(t, "otto")
	c.nina, _ = w.newStranger(t, "nina")
	c.zoe, c.zoeKey = w.newStranger(t, "zoe")
	c.mallory, c.malloryKey = w.newStranger(t, "mallory")
	c.bot = w.newBot(t, func(config botproc.Config) {
		pin(config, c.olga.UserID, c.olgaKey)
		pin(config, c.otto.UserID, ottoKey)
		config["trust"].(botproc.Config)["operators"] = []string{
			c.olga.UserID.String(), c.otto.UserID.String(), c.nina.UserID.String(), c.zoe.UserID.String(),
		}
	})
	c.room = newRoom(t, true, c.bot, c.olga, c.otto, c.nina, c.zoe, c.mallory)
	return c
}

// command is the one that all attempts aim at.
func (c *court) command() string {
	return fmt.Sprintf("!trust verify %s %s", c.mallory.UserID, c.malloryKey)
}

// expectAnswer waits for the answer to a command, and compares its code and a part of its words.
func (c *court) expectAnswer(t *testing.T, eventID id.EventID, code string, says ...string) people.Answer {
	t.Helper()
	answer := *must(c.olga.WaitForAnswer(within(t, patience), eventID))(t)
	if answer.Annotation.Code != code {
		t.Errorf("the answer has the code %s, not %s", answer.Annotation.Code, code)
	}
	if !contains(answer.Body, says...) {
		t.Errorf("the answer does not say %q: %s", says, answer.Body)
	}
	if answer.Malformed != nil || !answer.Encrypted || answer.InReplyTo != eventID {
		t.Errorf("not an answer as agreed: %+v", answer)
	}
	return answer
}

// obeyed has olga give a command that is carried out.
func (c *court) obeyed(t *testing.T, command, says string) id.EventID {
	t.Helper()
	eventID := must(c.olga.Send(within(t, patience), c.room, command))(t)
	c.expectAnswer(t, eventID, "verified", says)
	return eventID
}

func TestOperatorVerifiesAndUnverifiesSomebody(t *testing.T) {
	t.Parallel()
	c := newCourt(t)
	ctx := within(t, 3*patience)
	before := must(c.zoe.Send(ctx, c.room, say("hello")))(t)
	c.expectAnswer(t, before, "unverified_identity")

	groups := strings.Join(strings.SplitAfter(c.zoeKey.String(), "A"), " ")
	verify := must(c.olga.Send(ctx, c.room, "!trust verify “"+c.zoe.UserID.String()+"” "+groups+"="))(t)
	c.expectAnswer(t, verify, "verified", c.zoe.UserID.String()+" is verified now")
	must(c.olga.WaitForAnswerThat(ctx, before, func(a people.Answer) bool { return a.Annotation.Code == "verified" }))(t)
	after := must(c.zoe.Send(ctx, c.room, say("it is me")))(t)
	c.expectAnswer(t, after, "verified")

	_, _, err := c.bot.Stop(ctx)
	ok(t, err)
	ok(t, c.bot.Restart(ctx))
	again := must(c.zoe.Send(ctx, c.room, say("still me")))(t)
	c.expectAnswer(t, again, "verified")

	// Whom an operator has verified in chat may be an operator.
	recheck := must(c.zoe.Send(ctx, c.room, "!trust recheck "+c.olga.UserID.String()))(t)
	c.expectAnswer(t, recheck, "verified", "I have asked the server anew for the keys of one person")

	unverify := must(c.olga.Send(ctx, c.room, "!trust unverify "+c.zoe.UserID.String()))(t)
	c.expectAnswer(t, unverify, "verified", "is not verified any more")
	must(c.olga.WaitForAnswerThat(ctx, again, func(a people.Answer) bool { return a.Annotation.Code == "unverified_identity" }))(t)

	// The same words could be from before that: they count with a code.
	late := must(c.olga.Send(ctx, c.room, "!trust verify "+c.zoe.UserID.String()+" "+c.zoeKey.String()))(t)
	asked := c.expectAnswer(t, late, "verified", "It was taken back before that "+c.zoe.UserID.String()+" is verified")
	confirm := aCode.FindString(asked.Body)
	notYet := must(c.zoe.Send(ctx, c.room, say("and now?")))(t)
	c.expectAnswer(t, notYet, "unverified_identity")
	if confirm == "" {
		t.Fatalf("there is no code in it: %s", asked.Body)
	}
	confirmed := must(c.olga.Send(ctx, c.room, confirm))(t)
	c.expectAnswer(t, confirmed, "verified", c.zoe.UserID.String()+" is verified now")
	must(c.olga.WaitForAnswerThat(ctx, notYet, func(a people.Answer) bool { return a.Annotation.Code == "verified" }))(t)
	used := must(c.olga.Send(ctx, c.room, confirm))(t)
	c.expectAnswer(t, used, "verified", "No verification is under way")

	pinned := must(c.olga.Send(ctx, c.room, "!trust unverify "+c.otto.UserID.String()))(t)
	c.expectAnswer(t, pinned, "verified", "The configuration of this bot decides about "+c.otto.UserID.String())

	audit := must(c.olga.Send(ctx, c.room, "!trust audit"))(t)
	lines := c.expectAnswer(t, audit, "verified", "entries")
	for _, expected := range []struct {
		eventID id.EventID
		outcome string
	}{{verify, "done"}, {recheck, "done"}, {unverify, "done"}, {late, "refused"}, {confirmed, "done"}, {used, "refused"}, {pinned, "refused"}} {
		line := lineWith(lines.Body, expected.eventID.String())
		if !contains(line, expected.outcome) {
			t.Errorf("the audit table does not say that %s was %s: %q", expected.eventID, expected.outcome, line)
		}
	}
	if line := lineWith(lines.Body, verify.String()); !contains(line, c.olga.UserID.String(), c.olga.DeviceID.String(), c.olgaKey.String(), "verify") {
		t.Errorf("the audit table does not say who it was, and by which device and key: %q", line)
	}
}

func lineWith(body, part string) string {
	for line := range strings.Lines(body) {
		if strings.Contains(line, part) {
			return line
		}
	}
	return ""
}

// Everybody who writes in an operator's name without being that, or without being sure to be, is refused, told so, and noted.
func TestNobodyElseIsAnOperator(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	c := newCourt(t)
	ctx := within(t, 5*patience)
	attempts := map[string]id.EventID{}
	attempt := func(name string, eventID id.EventID, err error) func(code string, says ...string) {
		t.Helper()
		ok(t, err)
		attempts[name] = eventID
		return func(code string, says ...string) {
			t.Helper()
			t.Log(name)
			c.expectAnswer(t, eventID, code, says...)
		}
	}
	const notSure = "I am not sure that this came from"

	second := w.login(t, c.olga.UserID.String(), people.Options{})
	ok(t, second.WaitJoined(ctx, c.room, c.bot.UserID))
	eventID, err := second.Send(ctx, c.room, c.command())
	attempt("unsigned device of an operator", eventID, err)("unsigned_device", notSure, "has not confirmed")

	eventID, err = c.olga.SendClear(ctx, c.room, c.command())
	attempt("plaintext", eventID, err)("sent_in_clear", notSure, "without encryption")

	eventID, err = c.nina.Send(ctx, c.room, c.command())
	attempt("an operator whom nobody has verified", eventID, err)("unverified_identity", notSure, "not verified in person")

	eventID, err = c.mallory.Send(ctx, c.room, c.command())
	attempt("no operator", eventID, err)("unverified_identity", "That is for the operators of this bot")

	// Synapse gives nobody a name in another alphabet; a digit does the same.
	lookAlike, _ := w.newStranger(t, "o1ga")
	twoOfThem := newRoom(t, true, c.bot, c.olga, lookAlike)
	eventID, err = lookAlike.Send(ctx, twoOfThem, c.command())
	attempt("a name that looks like an operator's", eventID, err)("unverified_identity", "That is for the operators of this bot")

	// A command that was obeyed once, and is not to be again.
	obeyed := c.obeyed(t, c.command(), "is verified now")
	c.obeyed(t, "!trust unverify "+c.mallory.UserID.String(), "is not verified any more")
	eventID, err = c.olga.Resend(ctx, c.room, obeyed)
	attempt("replay", eventID, err)("mismatched_sender", "was sent before")
	earlier := must(c.olga.Event(ctx, c.room, obeyed))(t)
	eventID, err = c.olga.SendRaw(ctx, twoOfThem, earlier.Type.Type, earlier.Content.VeryRaw)
	attempt("another room's replay", eventID, err)("unable_to_decrypt", "another room")

	hello := must(c.olga.Send(ctx, c.room, say("hello")))(t)
	c.expectAnswer(t, hello, "verified")
	eventID, err = c.olga.SendEdit(ctx, c.room, hello, c.command())
	attempt("edit", eventID, err)("verified", "I do not obey a message that was edited")

	foreign := must(c.mallory.NewSession(c.room))(t)
	ok(t, c.mallory.ShareKey(ctx, foreign, c.bot.UserID))
	encrypted := must(c.mallory.Encrypt(foreign, "m.room.message", map[string]any{"msgtype": "m.text", "body": c.command()}))(t)
	eventID, err = c.olga.SendRaw(ctx, c.room, "m.room.encrypted", encrypted)
	attempt("another's session under an operator's name", eventID, err)("mismatched_sender", "was not written by")

	claimed := must(c.olga.CurrentSession(ctx, c.room))(t)
	ok(t, c.mallory.ShareKey(ctx, claimed, c.bot.UserID))
	settle(t, c.mallory, c.room) // the bot has the claim
	eventID, err = c.olga.Send(ctx, c.room, c.command())
	attempt("a session that two devices claim", eventID, err)("session_conflict", notSure, "Two devices claim")
	c.olga.RotateSession(c.room)

	inviter := w.newElement(t, "inviter")
	history, session := historyOf(t, c.olga, inviter)
	ok(t, inviter.Invite(ctx, history, c.bot.UserID, true))
	ok(t, c.olga.WaitJoined(ctx, history, c.bot.UserID))
	eventID, err = c.olga.SendWith(ctx, session, c.command())
	attempt("a session that came from somebody else", eventID, err)("authenticity_not_guaranteed", notSure, "cannot be proven")

	// The message of somebody who was an operator when they wrote it, and is none any more when the bot can read it.
	c.obeyed(t, fmt.Sprintf("!trust verify %s %s", c.zoe.UserID, c.zoeKey), "is verified now")
	waiting, unshared, err := c.zoe.SendWithoutKey(ctx, c.room, c.command())
	ok(t, err)
	c.obeyed(t, "!trust unverify "+c.zoe.UserID.String(), "is not verified any more")
	ok(t, c.zoe.ShareKey(ctx, unshared, c.bot.UserID))
	attempt("an old message after unverify", waiting, nil)("unverified_identity", notSure)

	eventID, err = c.olga.SendContent(ctx, c.room, map[string]any{"msgtype": "m.file", "body": c.command(), "url": "mxc://localhost/nothing"})
	attempt("the name of a file", eventID, err)("verified", "the name of a file")

	eventID, err = c.olga.Send(ctx, c.room, strings.Replace(c.command(), "verify", "verify \u202e", 1))
	attempt("invisible characters", eventID, err)("verified", "invisible characters")

	eventID, err = c.olga.Send(ctx, c.room, c.command()+strings.Repeat(" and so on", 4000))
	attempt("40 KB", eventID, err)("verified", "too long for a command")

	eventID, err = c.olga.Send(ctx, c.room, c.command()[:len(c.command())-5])
	attempt("half a key", eventID, err)("verified", "That is not a public key")

	must(c.otto.ResetIdentity(ctx))(t)
	eventID, err = c.otto.Send(ctx, c.room, c.command())
	attempt("reset identity", eventID, err)("verification_violation", notSure, "has been replaced")

	audit := must(c.olga.Send(ctx, c.room, "!trust audit 100"))(t)
	lines := c.expectAnswer(t, audit, "verified", "entries")
	for name, eventID := range attempts {
		if line := lineWith(lines.Body, eventID.String()); !contains(line, "refused") {
			t.Errorf("%s is not in the audit table as refused: %q", name, line)
		}
	}
	last := must(c.mallory.Send(ctx, c.room, say("am I verified?")))(t)
	c.expectAnswer(t, last, "unverified_identity")
}
