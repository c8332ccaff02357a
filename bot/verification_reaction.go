package bot

import (
	"context"
	"strings"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// reactions are what an operator can press below a notice about a verification, and the commands that they stand for.
var reactions = map[string]string{"✅": "confirm", "✔": "confirm", "❌": "deny", "✖": "deny"}

// emojiStyle is the sign that asks for a coloured emoji.
const emojiStyle = "\ufe0f"

// onReaction takes reactions to what the bot shows. They count like commands: by the verdict on the reaction itself. Most apps send them
// in the clear, so that nobody can tell who has pressed it; then the bot says so.
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
	v.mu.Lock()
	d := v.noticed(content.RelatesTo.EventID)
	v.mu.Unlock()
	if d == nil {
		return
	}
	if verdict, judged = v.bot.whileTrusted(ctx, verdict, evt.Sender); !judged || !v.bot.mayAnswer(ctx, evt, verdict) {
		return
	}
	o := &order{evt: evt, verdict: verdict, speech: v.bot.speech(evt.RoomID), name: name, args: []string{d.userID.String()}, related: true}
	v.bot.answerReaction(ctx, o, content.RelatesTo.EventID)
}

// answerReaction carries a reaction out as the command that it stands for, and says what came of it.
func (b *Bot) answerReaction(ctx context.Context, o *order, notice id.EventID) {
	var r response
	if o.verdict.Code == cryptohook.CodeSentInClear || o.verdict.Code == cryptohook.CodeNotEncrypted {
		r = refuse(o.speech.text(signCaution, "verification.reaction", vars{
			"Sender": showUser(o.evt.Sender), "Command": o.name, "Name": o.args[0],
		}), "a reaction that was not encrypted")
		b.note(ctx, o, r)
	} else if c, known := findCommand(o.name); known {
		r = b.carryOutForOperators(ctx, c, o)
	}
	b.send(ctx, o.evt.RoomID, noticeContent(r.words, replyTo(notice, "")), transactionID(o.evt.ID))
}
