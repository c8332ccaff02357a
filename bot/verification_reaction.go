package bot

import (
	"context"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// reactions are what somebody may press below a notice about a verification, and the commands that they mean.
var reactions = map[string]string{"✅": "confirm", "✔": "confirm", "❌": "deny", "✖": "deny"}

// emojiStyle is the sign that asks for a coloured emoji.
const emojiStyle = "\ufe0f"

// onReaction answers reactions to what the bot shows: they do not count, and what does is said. Most apps send them in the clear. Of those that
// are encrypted, which emoji it is and to what are in the clear all the same (m.relates_to), so that a server can change both.
// https://spec.matrix.org/v1.16/client-server-api/#mmegolmv1aes-sha2
func (v *verifications) onReaction(ctx context.Context, evt *event.Event) {
	verdict, judged := cryptohook.VerdictOf(evt)
	content, isReaction := evt.Content.Parsed.(*event.ReactionEventContent)
	if !judged || !isReaction || evt.Sender == v.bot.client.UserID {
		return
	}
	name := reactions[strings.TrimSuffix(content.RelatesTo.Key, emojiStyle)]
	if name == "" {
		return
	}
	word, noticed := v.wordFor(content.RelatesTo.EventID, name)
	if !noticed {
		return
	}
	if verdict, judged = v.bot.whileTrusted(ctx, verdict, evt.Sender); !judged || !v.bot.mayAnswer(ctx, evt, verdict) {
		return
	}
	o := &order{evt: evt, verdict: verdict, speech: v.bot.speech(evt.RoomID), name: name}
	r := refuse(o.speech.text(signCaution, "verification.reaction", vars{"Command": name, "Word": word}), "a reaction")
	v.bot.note(ctx, o, r)
	v.bot.send(ctx, evt.RoomID, noticeContent(r.words, replyTo(content.RelatesTo.EventID, "")), transactionID(evt.ID))
}

// wordFor is what belongs behind a command about the verification that a notice is about. It says no if it is about none that is open.
func (v *verifications) wordFor(notice id.EventID, command string) (word string, noticed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := v.noticed(notice)
	switch {
	case d == nil:
		return "", false
	case command == "confirm" && d.code != "":
		return d.code, true
	}
	return d.userID.String(), true
}
